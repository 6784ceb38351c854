"""Matrix-vector products of a decoding step of one row."""
