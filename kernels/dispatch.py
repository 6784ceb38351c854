"""Which implementation of an operator runs: plain PyTorch or Triton.

Precedence: `set_backend`, then the environment variable MEGATRON_TN_KERNELS, then "auto", which takes Triton for CUDA
tensors where Triton is installed and the operator's kernel supports the inputs, and PyTorch otherwise. The choice is
made inside the registered operators, so compiled and fake-tensor code never sees it.
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
OLDEST_CAPABILITY = 8  # the first with bf16 products; the tables of tiles begin with it

_override: str | None = None
_logged: set[tuple[str, str, str, str]] = set()


def set_backend(name: str) -> None:
    """Choose the implementation of every operator from here on: "auto", "torch" or "triton".

    "auto" hands the choice back to MEGATRON_TN_KERNELS where that is set. With "triton", an operator whose kernel
    cannot take its inputs raises instead of falling back. Raises ValueError for another name.
    """
    global _override
    _check(name, "name")
    _override = None if name == "auto" else name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """set_backend for the length of a `with` block."""
    global _override
    before = _override
    set_backend(name)
    try:
        yield
    finally:
        _override = before


def requested_backend() -> str:
    """The backend asked for: "auto", "torch" or "triton". Raises ValueError where the environment names another."""
    if _override is not None:
        return _override
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    _check(name, ENVIRONMENT_VARIABLE)
    return name


def choose(operator: str, tensor: Tensor, unsupported: str | None = None) -> str:
    """Return "torch" or "triton" for this call of `operator`, and log the choice the first time it is made.

    tensor: an input, for its device. unsupported: why the Triton kernel cannot take these inputs, None if it can.
    Raises ValueError when Triton was asked for by name and cannot run.
    """
    request = requested_backend()
    obstacle = unsupported or _triton_obstacle(tensor)
    if request == "triton" and obstacle:
        raise ValueError(f"backend 'triton' was asked for and cannot run {operator}: {obstacle}")
    if request == "auto":
        # The interpreter runs CPU tensors for tests only; it is thousands of times slower than PyTorch.
        backend = "triton" if tensor.is_cuda and not obstacle else "torch"
        reason = obstacle or "automatic choice"
    else:
        backend, reason = request, "as requested"
    _log_once(operator, tensor.device.type, backend, reason)
    return backend


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


def _check(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}={name!r} is not one of the backends {BACKENDS}")


def _triton_obstacle(tensor: Tensor) -> str | None:
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its inputs are on device {tensor.device.type!r}, not on a CUDA device"
    # A plan's tensors only say that they are on a GPU (planning/stand_ins.py), with one there or without.
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
        # On a GPU a fallback costs a multiple of the time, and is worth more than a line among many.
        level = (
            logging.WARNING if device == "cuda" and backend == "torch" and reason != "as requested" else logging.INFO
        )
        logger.log(level, "%s on %s runs with %s (%s)", operator, device, backend, reason)
