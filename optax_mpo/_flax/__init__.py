"""Objects for training with Flax: a train state for Linen, an optimizer for NNX."""
