"""Peak GPU memory of a training step, without a GPU."""
