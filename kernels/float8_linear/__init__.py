"""Products with weights that are kept in fp8, one scale a row, for decoding."""
