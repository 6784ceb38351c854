"""The operators under measurement: their inputs, what they must agree with, and the bytes they cannot avoid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels.srmsnorm import reference


@dataclass(frozen=True)
class Case:
    """function(*inputs) is measured forward, and forward + backward with `gradient` at its output."""

    name: str
    function: Callable[..., Tensor]
    inputs: list[Tensor]
    gradient: Tensor
    exact: Callable[..., Tensor]  # the same in fp64

    @property
    def forward_bytes(self) -> int:
        """Each input read once, the output written once."""
        return sum(x.nbytes for x in (*self.inputs, self.gradient))

    @property
    def backward_bytes(self) -> int:
        """Each input and the output's gradient read once, each input's gradient written once."""
        return self.forward_bytes + sum(x.nbytes for x in self.inputs)

    def worst_error(self) -> float:
        """The largest relative error in norm of the output and the gradients."""
        got = _with_gradients(self.function, self.inputs, self.gradient)
        wanted = _with_gradients(self.exact, [x.detach().double().requires_grad_() for x in self.inputs], self.gradient)
        return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True))

    def forward(self) -> Tensor:
        return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.gradient)


def cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """Pairs of a case small enough to be judged in fp64 and the case to time, of the same widths and type."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    heads, width = (32, 128) if gpu else (4, 64)
    for length in (1024, 8192, 32768) if gpu else (512,):
        batch = max(32768 // length, 1) if gpu else 8
        yield _attention(1, 321, heads, width, dtype, device), _attention(batch, length, heads, width, dtype, device)
    rows = 32768 if gpu else 4096
    for columns in (2048, 4096) if gpu else (256,):
        yield _norm(65, columns, dtype, device), _norm(rows, columns, dtype, device)


def _attention(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    inputs = [_random(batch, length, heads, width, dtype=dtype, device=device).requires_grad_() for _ in range(3)]
    return Case(
        f"lightning attention B {batch} N {length} H {heads} d {width}",
        lambda q, k, v: kernels.lightning_attention(q, k, v, decay),
        inputs,
        _random(batch, length, heads, width, dtype=dtype, device=device),
        lambda q, k, v: kernels.lightning_attention(q, k, v, decay),  # fp64 runs the chunked PyTorch form
    )


def _norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    return Case(
        f"simple_rms_norm {rows} x {columns}",
        kernels.simple_rms_norm,
        [_random(rows, columns, dtype=dtype, device=device).requires_grad_()],
        _random(rows, columns, dtype=dtype, device=device),
        reference.simple_rms_norm,
    )


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]
