"""Megatron-style pretraining of TransNormerLLM, the linear-attention language model of arXiv 2307.14995."""

from megatron_tn.parallel.context import ParallelContext
from megatron_tn.released.weights import load_pretrained

__all__ = ["ParallelContext", "load_pretrained"]
__version__ = "0.1.0"
