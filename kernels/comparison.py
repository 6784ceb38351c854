"""Comparison of operators with their definitions in fp64, on random inputs, with a fall back to plain PyTorch."""

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import dispatch

logger = logging.getLogger(__name__)

# Largest allowed relative error in norm against fp64, by input type; the tests use the same bounds.
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}


class KernelMismatchError(RuntimeError):
    """A kernel disagrees with its definition on this device."""


@dataclass(frozen=True)
class Check:
    """`function` and `definition` get random inputs of `shapes`; `definition` in fp64, with backend "torch"."""

    operator: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    bounds: Mapping[torch.dtype, float] = field(default_factory=lambda: LARGEST_ERROR)
    differentiable: bool = True


def compare(
    checks: Callable[[], Iterable[Check]],
    dtype: torch.dtype,
    device: torch.device,
    fall_back: bool,
    order: int = 0,
) -> dict[str, float]:
    """Operator -> the largest relative error of its output and its inputs' gradients.

    fall_back: if an operator is wrong, log it, switch this process to plain PyTorch, and check again.
    order: 0 runs the checks one after the other, each other number in another order. Processes of one machine compile
        different kernels then, and find those of the others in Triton's cache.

    Raises KernelMismatchError, which names the first wrong operator in the order of `checks`, its error and the bound.
    """
    try:
        return _errors(checks(), dtype, device, order)
    except KernelMismatchError as mismatch:
        if not fall_back or dispatch.requested_backend() == "torch":
            raise
        logger.error("%s; all operators run in PyTorch from here on", mismatch)
    dispatch.set_backend("torch")
    return _errors(checks(), dtype, device, order)


def _errors(checks: Iterable[Check], dtype: torch.dtype, device: torch.device, order: int) -> dict[str, float]:
    in_order = list(checks)
    wrong = count = len(in_order)
    errors, indices = [0.0] * count, list(range(count))
    if order > 1:
        random.Random(order // 2).shuffle(indices)
    for index in reversed(indices) if order % 2 else indices:  # two processes meet in the middle
        if index < wrong:  # a check after a wrong one cannot be the first wrong one
            errors[index] = _worst_error(in_order[index], dtype, device)
            if not errors[index] <= in_order[index].bounds[dtype]:  # NaN fails, too
                wrong = index
    if wrong < count:
        check = in_order[wrong]
        raise KernelMismatchError(
            f"{check.operator} at {check.shapes} in {dtype} on {device} is off by {errors[wrong]:.1e} relative to "
            f"fp64, more than {check.bounds[dtype]:.0e}"
        )
    return {check.operator: error for check, error in zip(in_order, errors, strict=True)}


def _worst_error(check: Check, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error in norm of the output and the inputs' gradients, on fixed random inputs."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the global generator, which training uses, unchanged

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = [draw(shape).requires_grad_() for shape in check.shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = check.function(*inputs)
        gradient = draw(out.shape)
        values = (out, *(torch.autograd.grad(out, inputs, gradient) if check.differentiable else ()))
        with dispatch.backend("torch"):
            wanted = check.definition(*exact)
            gradients = torch.autograd.grad(wanted, exact, gradient.double()) if check.differentiable else ()
            expected = (wanted, *gradients)
    errors = [(x.double() - y).norm() / y.norm() for x, y in zip(values, expected, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any is
