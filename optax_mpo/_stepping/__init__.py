"""Where in the backward pass a weight is updated, and automatic gradient release, `value_and_update`."""
