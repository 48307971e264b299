"""Jaxprs as data, and what is known of them."""
