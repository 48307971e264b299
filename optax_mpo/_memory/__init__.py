"""Peak memory of a step on a GPU that need not be there."""
