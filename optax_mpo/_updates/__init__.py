"""`tx.update` taken apart into updates of single leaves, also where small arrays such as a norm couple the leaves."""
