"""Gradient release by layers: the `custom_vjp` wrappers and the step around them."""
