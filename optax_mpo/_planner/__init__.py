"""The command line: which storages and batch sizes of a model fit on a card, without the card."""
