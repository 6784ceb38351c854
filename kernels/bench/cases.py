"""Benchmark cases: operator, inputs, definition, memory traffic. Here: the class, and the elementwise operators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.bench.peers import Peer
from kernels.numerics import accumulation_dtype
from kernels.rmsnorm import reference as rmsnorm_reference
from kernels.rope import reference as rope_reference
from kernels.sglu import reference as sglu_reference
from kernels.srmsnorm import reference


@dataclass(frozen=True)
class Case:
    """function(*inputs) is timed forward, and forward + backward from `gradients`, one per output. Without gradients,
    only the forward pass is timed.

    operator, shape: labels in the table and the rows.
    exact: the definition, called with the inputs in fp64.
    spared_bytes: subtracted in `backward_bytes`, for an operator that need not read or write some of these bytes;
        negative for an operator that reads or writes more.
    peers: other implementations of the operator, or of the operator it replaces, on the same inputs.
    chained: several operators in a row, each rounding its result: a larger error is allowed.
    length: positions per row, for the plot of time over length; None: not plotted.
    output_bytes: bytes of the outputs, if not equal to those of `gradients`.
    in_place: the outputs are among the inputs.
    products: matrix products whose time replaces the memory traffic's as the lower bound.
    """

    operator: str
    shape: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]
    gradients: list[Tensor]
    exact: Callable[..., Tensor | tuple[Tensor, ...]]
    spared_bytes: int = 0
    peers: tuple[Peer, ...] = ()
    chained: bool = False
    length: int | None = None
    output_bytes: int | None = None
    in_place: bool = False
    products: Callable[[], object] | None = None

    @property
    def written_bytes(self) -> int:
        return sum(x.nbytes for x in self.gradients) if self.output_bytes is None else self.output_bytes

    @property
    def forward_bytes(self) -> int:
        """Each input read once, each output written once."""
        return sum(x.nbytes for x in self.inputs) + self.written_bytes

    @property
    def backward_bytes(self) -> int:
        """Each input and each output's gradient read once, each input's gradient written once."""
        return self.forward_bytes + sum(x.nbytes for x in self.inputs) - self.spared_bytes

    def worst_error(self) -> float:
        """The largest relative error in norm over outputs and gradients; NaN if any error is NaN."""
        got = _with_gradients(self.function, self.inputs, self.gradients)
        exact_inputs = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in self.inputs]
        wanted = _with_gradients(self.exact, exact_inputs, self.gradients)
        errors = [(g.double() - w).norm() / w.norm() for g, w in zip(got, wanted, strict=True)]
        return torch.stack(errors).max().item()

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.gradients)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs if x.requires_grad]


def cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """Pairs (small case to compare with fp64, case to time) of the same widths and type."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for build in (_norm, _branch_norm, _add_norm, _add_scaled_norm, _add_weighted_norm, _sglu, _rope):
        for rows in (4096, 32768) if gpu else (4096,):
            for columns in (2048, 4096) if gpu else (256,):
                yield build(65, columns, dtype, device), build(rows, columns, dtype, device)


def _norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    (x, dy) = random_inputs(2, rows, columns, dtype=dtype, device=device)
    return Case(
        "simple_rms_norm",
        f"{rows} x {columns}",
        kernels.simple_rms_norm,
        [x],
        [dy.detach()],
        reference.simple_rms_norm,
        peers=(Peer("torch.nn.functional.rms_norm", lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6)),),
    )


def _branch_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    """branch_simple_rms_norm: no copy of x in the forward pass; backward reads the gradients of x and of the norm."""

    def exact(x):
        return x * 1, reference.simple_rms_norm(x)

    x, dx, dy = random_inputs(3, rows, columns, dtype=dtype, device=device)
    return Case(
        "branch_simple_rms_norm",
        f"{rows} x {columns}",
        kernels.branch_simple_rms_norm,
        [x],
        [dx.detach(), dy.detach()],
        exact,
        output_bytes=x.nbytes,
        spared_bytes=-x.nbytes,
    )


def _add_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    def exact(x, residual):
        total = x + residual
        return total, reference.simple_rms_norm(total)

    x, residual, dtotal, dy = random_inputs(4, rows, columns, dtype=dtype, device=device)
    return Case(
        "add_simple_rms_norm",
        f"{rows} x {columns}",
        kernels.add_simple_rms_norm,
        [x, residual],
        [dtotal.detach(), dy.detach()],
        exact,
        spared_bytes=2 * x.nbytes,  # backward reads the sum, not both inputs, and writes one gradient for both
    )


def _add_scaled_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    """add_scaled_simple_rms_norm: the residual is scaled by 1 / sqrt(square_sum / D + eps) before the addition."""

    def exact(x, residual, square_sum):
        total = x + reference.rms_scaled(residual, square_sum, columns)
        return total, reference.simple_rms_norm(total)

    x, residual, dtotal, dy = random_inputs(4, rows, columns, dtype=dtype, device=device)
    square_sum = residual.detach().to(accumulation_dtype(dtype)).square().sum(-1).requires_grad_()
    return Case(
        "add_scaled_simple_rms_norm",
        f"{rows} x {columns}",
        kernels.add_scaled_simple_rms_norm,
        [x, residual, square_sum],
        [dtotal.detach(), dy.detach()],
        exact,
        spared_bytes=x.nbytes,  # backward reads the sum and one of the inputs
    )


def _add_weighted_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    def exact(x, residual, weight):
        total = x + residual
        return total, rmsnorm_reference.rms_norm(total, weight)

    def torchs(x, residual, weight):
        total = x + residual
        return total, F.rms_norm(total, weight.shape, weight, eps=1e-6)

    x, residual, dtotal, dy = random_inputs(4, rows, columns, dtype=dtype, device=device)
    (weight,) = random_inputs(1, columns, dtype=dtype, device=device)
    return Case(
        "add_rms_norm",
        f"{rows} x {columns}",
        kernels.add_rms_norm,
        [x, residual, weight],
        [dtotal.detach(), dy.detach()],
        exact,
        spared_bytes=2 * x.nbytes,  # backward reads the sum, not both inputs, and writes one gradient for both
        peers=(Peer("torch.nn.functional.rms_norm", torchs),),
    )


def _rope(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    options = {"head_dim": min(columns, 128)}
    positions = torch.arange(rows, device=device)

    def function(q, k):
        return kernels.rope(q, k, positions, **options)

    def exact(q, k):
        return tuple(rope_reference.rope(x, positions, **options) for x in (q, k))

    q, k, dq, dk = random_inputs(4, 1, rows, columns, dtype=dtype, device=device)
    gradients = [dq.detach(), dk.detach()]
    spared = 2 * q.nbytes  # backward does not read the inputs
    return Case("rope", f"{rows} x {columns}", function, [q, k], gradients, exact, spared_bytes=spared)


def _sglu(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Case:
    a, b, dy = random_inputs(3, rows, columns, dtype=dtype, device=device)
    return Case("sglu", f"{rows} x {columns}", kernels.sglu, [a, b], [dy.detach()], sglu_reference.sglu)


def random_inputs(count: int, *shape: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(*shape, dtype=dtype, device=device).requires_grad_() for _ in range(count)]


def _with_gradients(function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    out = (out,) if isinstance(out, Tensor) else out
    if not gradients:
        return list(out)
    leaves = [x for x in inputs if x.requires_grad]
    return [*out, *torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(gradients, out, strict=True)])]
