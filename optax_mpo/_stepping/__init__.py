"""Where in the backward pass a weight is updated, and the automatic route, `value_and_update`."""
