"""Megatron-style pretraining of TransNormerLLM, the linear-attention language model of arXiv 2307.14995."""

from megatron_tn.checkpoint.hf import load_pretrained
from megatron_tn.parallel.context import ParallelContext

__all__ = ["ParallelContext", "load_pretrained"]
__version__ = "0.1.0"
