"""How one weight is updated on this machine."""
