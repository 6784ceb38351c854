"""Decoding: continuations of prompts, sessions, and states of prefixes."""

from megatron_tn.inference.generator import Generator, Request, generate, stream
from megatron_tn.inference.prefix import Prefix
from megatron_tn.inference.sampler import Sampler
from megatron_tn.inference.session import Session
from megatron_tn.parallel.fp8_weights import keep_in_fp8

__all__ = ["Generator", "Prefix", "Request", "Sampler", "Session", "generate", "keep_in_fp8", "stream"]
