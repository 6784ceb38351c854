"""The operators' benchmark: `python -m kernels.bench`."""
