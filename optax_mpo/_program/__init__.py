"""Jaxprs as data, and analyses of them."""
