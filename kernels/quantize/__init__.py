"""Quantisation of tensors to fp8, one power-of-two scale a tensor."""
