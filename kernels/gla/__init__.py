"""Gated linear attention on the fused q|k|v|u projection, for training and decoding."""
