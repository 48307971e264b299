"""Numbers: one array in, one array out. Low precision with the bits that it cut off, and 8-bit blocks."""
