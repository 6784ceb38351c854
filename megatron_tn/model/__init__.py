"""Architectures, looked up by name in registry.py: TransNormerLLM, a Transformer, cosFormer, TransNormer."""
