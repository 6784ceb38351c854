"""The operators under measurement: their inputs, what they must agree with, and the bytes they cannot avoid."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels.bench.peers import Peer, attention_peers
from kernels.norm_gate import reference as norm_gate_reference
from kernels.sglu import reference as sglu_reference
from kernels.srmsnorm import reference


@dataclass(frozen=True)
class Case:
    """function(*inputs) is measured forward, and forward + backward with `gradients` at its outputs."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    gradients: list[Tensor]
    exact: Callable[..., Tensor | tuple[Tensor, ...]]  # the same in fp64
    spared_bytes: int = 0  # of the backward pass's count below, what this operator need not move
    peers: tuple[Peer, ...] = ()  # others' kernels for the same, or for what it replaces, on inputs of the same sizes

    @property
    def forward_bytes(self) -> int:
        """Each input read once, each output written once."""
        return sum(x.nbytes for x in (*self.inputs, *self.gradients))

    @property
    def backward_bytes(self) -> int:
        """Each input and each output's gradient read once, each input's gradient written once."""
        return self.forward_bytes + sum(x.nbytes for x in self.inputs) - self.spared_bytes

    def worst_error(self) -> float:
        """The largest relative error in norm of the outputs and the gradients."""
        got = _with_gradients(self.function, self.inputs, self.gradients)
        exact_inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        wanted = _with_gradients(self.exact, exact_inputs, self.gradients)
        return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, wanted, strict=True))

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.gradients)


def cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """Pairs of a case small enough to be judged in fp64 and the case to time, of the same widths and type."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    heads, width = (32, 128) if gpu else (4, 64)
    for length in (1024, 2048, 8192, 32768, 131072) if gpu else (512,):
        batch = max(32768 // length, 1) if gpu else 8
        yield _attention(1, 321, heads, width, dtype, device), _attention(batch, length, heads, width, dtype, device)
    if gpu:
        yield _attention(1, 321, 8, width, dtype, device), _attention(1, 131072, 8, width, dtype, device)
    rows = 32768 if gpu else 4096
    for columns in (2048, 4096) if gpu else (256,):
        for build in (_norm, _add_norm, _gate, _sglu):
            yield build(65, columns, dtype, device), build(rows, columns, dtype, device)


def _attention(batch: int, length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    inputs = _random(3, batch, length, heads, width, dtype=dtype, device=device)
    return Case(
        f"lightning attention B {batch} N {length} H {heads} d {width}",
        lambda q, k, v: kernels.lightning_attention(q, k, v, decay),
        inputs,
        [_random(1, batch, length, heads, width, dtype=dtype, device=device)[0].detach()],
        lambda q, k, v: kernels.lightning_attention(q, k, v, decay),  # fp64 runs the chunked PyTorch form
        peers=attention_peers(length, decay, device),
    )


def _norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    (x, dy) = _random(2, rows, columns, dtype=dtype, device=device)
    return Case(
        f"simple_rms_norm {rows} x {columns}", kernels.simple_rms_norm, [x], [dy.detach()], reference.simple_rms_norm
    )


def _add_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    def exact(x, residual):
        total = x + residual
        return total, reference.simple_rms_norm(total)

    x, residual, dtotal, dy = _random(4, rows, columns, dtype=dtype, device=device)
    return Case(
        f"add_simple_rms_norm {rows} x {columns}",
        kernels.add_simple_rms_norm,
        [x, residual],
        [dtotal.detach(), dy.detach()],
        exact,
        spared_bytes=2 * x.nbytes,  # the sum stands for both inputs, and one gradient serves both
    )


def _gate(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Both steps, with the tensor between them that a tensor-parallel group needs: 13 readings and writings forward and
    backward, where one kernel for one rank would have 8."""

    def function(o, u):
        y, square_sum = kernels.gate_with_square_sum(o, u)
        return kernels.apply_rms_scale(y, square_sum, columns)

    o, u, dy = _random(3, rows, columns, dtype=dtype, device=device)
    return Case(f"norm and gate {rows} x {columns}", function, [o, u], [dy.detach()], norm_gate_reference.norm_gate)


def _sglu(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    a, b, dy = _random(3, rows, columns, dtype=dtype, device=device)
    return Case(f"sglu {rows} x {columns}", kernels.sglu, [a, b], [dy.detach()], sglu_reference.sglu)


def _random(count: int, *shape: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for _ in range(count)]


def _with_gradients(function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    out = (out,) if isinstance(out, Tensor) else out
    return [*out, *torch.autograd.grad(out, inputs, [g.to(o.dtype) for g, o in zip(gradients, out, strict=True)])]
