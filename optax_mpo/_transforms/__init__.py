"""Wrappers around an Optax transformation, and tools for its state."""
