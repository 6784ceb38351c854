"""Tensor, sequence and context parallelism: process layout, collectives, split layers, recomputation."""
