"""Gradient sums over microbatches and ranks, global gradient norm, clipping."""
