"""Megatron-style pretraining of TransNormerLLM, the linear-attention language model of arXiv 2307.14995."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_tn.parallel.context import ParallelContext
    from megatron_tn.released.weights import load_pretrained

__all__ = ["ParallelContext", "load_pretrained"]
__version__ = "0.1.0"

_PLACES = {"ParallelContext": "megatron_tn.parallel.context", "load_pretrained": "megatron_tn.released.weights"}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Imports torch at the first use of a name: programs set up how modules are imported before that."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
