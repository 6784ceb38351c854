"""Which implementation of an operator runs: plain PyTorch or Triton.

Precedence: `set_backend`, then the environment variable MEGATRON_TN_KERNELS, then "auto": Triton for CUDA tensors where
Triton is installed and the operator's kernel supports the inputs, else PyTorch. The registered operators choose at run
time, invisibly to torch.compile and fake tensors.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT_VARIABLE = "MEGATRON_TN_KERNELS"
OLDEST_CAPABILITY = 8  # major compute capability of Ampere: the first with bf16 products, the oldest with tiles

_override: str | None = None
_logged: set[tuple[str, str, str, str]] = set()


def set_backend(name: str) -> None:
    """Choose the implementation of every operator for the rest of this process: "auto", "torch" or "triton".

    "auto" undoes earlier calls: MEGATRON_TN_KERNELS, if set, decides again. With "triton", an operator raises
    ValueError if its kernel does not support the inputs; "auto" runs plain PyTorch instead. Raises ValueError for
    another name.
    """
    global _override
    _check(name, "name")
    _override = None if name == "auto" else name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`set_backend(name)` within a `with` block."""
    global _override
    before = _override
    set_backend(name)
    try:
        yield
    finally:
        _override = before


def requested_backend() -> str:
    """The configured backend: "auto", "torch" or "triton". Raises ValueError if the environment variable holds another
    name."""
    if _override is not None:
        return _override
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    _check(name, ENVIRONMENT_VARIABLE)
    return name


def choose(operator: str, tensor: Tensor, unsupported: str | None = None) -> str:
    """ "torch" or "triton", for this call of `operator`. Each choice is logged once.

    tensor: an input; its device and type decide: no kernel sums in fp64. unsupported: what else the Triton kernel does
    not support of the inputs; None if nothing. Raises ValueError where backend "triton" is configured and cannot run.
    """
    request = requested_backend()
    obstacle = unsupported or _triton_obstacle(tensor)
    if request == "triton" and obstacle:
        raise ValueError(f"backend 'triton' was asked for and cannot run {operator}: {obstacle}")
    if request == "auto":
        # Triton's interpreter runs on CPU tensors, thousands of times slower than PyTorch: for tests only.
        backend = "triton" if tensor.is_cuda and not obstacle else "torch"
        reason = obstacle or "automatic choice"
    else:
        backend, reason = request, "as requested"
    _log_once(operator, tensor.device.type, backend, reason)
    return backend


def in_words(device: str) -> str:
    """One line: what operators on a "cpu" or "cuda" device run with, as far as their inputs allow."""
    request = requested_backend()
    if request != "auto":
        return f"{request}, as requested"
    if device != "cuda":
        return "plain PyTorch: no GPU"
    return "Triton" if has_triton() else "plain PyTorch: triton is not installed"


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


def _check(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} is not one of the backends {BACKENDS}")


def _triton_obstacle(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "its fp32 sums cannot serve float64 inputs"
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its inputs are on device {tensor.device.type!r}, not on a CUDA device"
    # A memory plan's fake tensors have is_cuda set, on a CPU device.
    there = torch.cuda.is_available() and tensor.device.type == "cuda"
    if there and (capability := _capability(tensor.device)) < OLDEST_CAPABILITY:
        return f"the GPU's compute capability {capability}.x is older than {OLDEST_CAPABILITY}.x (Ampere)"
    return None


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _log_once(operator: str, device: str, backend: str, reason: str) -> None:
    key = (operator, device, backend, reason)
    if key not in _logged:
        _logged.add(key)
        # Plain PyTorch on a GPU takes several times as long: a warning. What was to be expected says `in_words`.
        slow = device == "cuda" and backend == "torch" and reason != "as requested"
        level = logging.WARNING if slow else logging.DEBUG
        logger.log(level, "%s on %s runs with %s (%s)", operator, device, backend, reason)
