"""Codecs, one array in, one array out: low precision with compensation bits, and 8-bit blocks."""
