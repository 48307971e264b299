"""What wraps an Optax transformation, and what goes with its state."""
