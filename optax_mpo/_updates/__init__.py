"""`tx.update` taken apart: into updates of single leaves, and of leaves that few numbers couple."""
