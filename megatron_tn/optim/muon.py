"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon; arXiv 2502.16982) for the matrices of the blocks, AdamW for the
rest. Of each logical matrix P [rows, columns] (q, k, v and u of a packed projection are four):

    M = mu M + (1 - mu) G
    O = NewtonSchulz((1 - mu) G + mu M)                                         Nesterov's form of the momentum
    P -= lr (0.2 sqrt(max(rows, columns)) O + weight_decay P)

O has min(rows, columns) singular values near 1, so an element's root mean square is 1 / sqrt(max(rows, columns)); the
factor makes that 0.2, about AdamW's (arXiv 2502.16982, section 2.2), so that one rate and one weight decay serve both.
optim.equal_norms scales the rows of O to one norm, or its columns where they are more, and keeps |O|_F: NorMuon
(arXiv 2510.05491) without its average of a row's mean square over steps, so without state. The columns of
a tall O and the rows of a wide one have norms near 1 already. With optim.heads_apart each head's rows of q, k, v and u
[d, D] are a logical matrix: every head has an update of the same size, and the iterations have D / d times fewer FLOPs.

M and P are updated element by element, wherever the engine keeps them. Only the Newton-Schulz iteration needs whole
matrices: `MatrixRound` brings them together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels import equalize_norms_, muon_apply_, muon_direction_, newton_schulz
from kernels.newton_schulz import op
from megatron_tn.optim.adamw import MOMENTS
from megatron_tn.optim.groups import MATRICES, set_rates
from megatron_tn.optim.protocol import Optimizer

MOMENTUM = "momentum"
ITERATIONS = 5  # Jordan 2024: fewer leave small singular values small, more do not lower the loss
RMS = 0.2  # root mean square of an update's elements / learning rate
FIRST_MOMENTUM = 0.85  # at the first step of a momentum warm-up (Jordan's NanoGPT speed runs)


class MatrixSpan(NamedTuple):
    """Elements [start, stop) of `master`, flattened: of one logical matrix of `shape` (rows, columns), or of several of
    that shape that follow each other."""

    master: Tensor
    start: int
    stop: int
    shape: tuple[int, int]

    def of(self, tensor: Tensor) -> Tensor:
        """View [stop - start] of the span's elements. tensor: of the master's shape."""
        return tensor.view(-1)[self.start : self.stop]


class Buffers(NamedTuple):
    """matrices: this rank's, [n, rows, columns], n >= 0. sent: elements of other ranks' matrices, flat."""

    matrices: Tensor
    sent: Tensor


class MatrixRound(Protocol):
    """Logical matrices that are updated together, each by one of the ranks that hold parts of it.

    spans: this rank's elements of all ranks' matrices. Each takes one launch, so they are as few and long as the
    masters, the matrices and what is sent allow.
    """

    spans: Sequence[MatrixSpan]

    def buffers(self, dtype: torch.dtype) -> tuple[Buffers, list[Tensor]]:
        """Uninitialised buffers of `dtype`, and the place of each span's elements in them."""
        ...

    def gather(self, buffers: Buffers) -> Tensor:
        """The whole matrices [n, rows, columns], n >= 0, that this rank orthogonalises, from all ranks' buffers: those
        of `buffers`, filled. Collective."""
        ...

    def scatter(self, matrices: Tensor) -> list[Tensor]:
        """The elements of each span, from the matrices [n, rows, columns] of all ranks, which it may overwrite.
        Collective."""
        ...


class _Groups(torch.optim.Optimizer):
    """Holds the parameter groups, which `Muon.adamw` shares, and the momenta."""

    def step(self, closure=None) -> None:
        """Nothing to do: DeepSpeed calls step() with zero gradients at initialisation."""


class Muon:
    """See `optim.protocol.Optimizer`. The groups with the key MATRICES hold the blocks' matrices.

    adamw: makes the optimizer of the other groups. It keeps the group dictionaries that it is given, so that masters
        that DeepSpeed puts in the place of parameters are in both.
    momentum, momentum_warmup_steps: mu rises linearly from FIRST_MOMENTUM to `momentum` over so many applied steps.
    equal_norms: whether the rows of O, or its columns where they are more, are scaled to one norm.
    heads_apart: whether each head of a projection to heads is a logical matrix; read by `engine.update.Update`.
    dtype: type of the matrices that ranks send each other, and that `newton_schulz` takes and returns.
    rounds: set by `engine.update.Update`. weight_decays: master -> its weight decay, for the masters of the matrices.
    """

    state_kinds = (MOMENTUM, *MOMENTS)
    whole_matrices = True

    def __init__(
        self,
        groups: list[dict],
        *,
        adamw: Callable[[list[dict]], Optimizer],
        momentum: float,
        momentum_warmup_steps: int,
        equal_norms: bool,
        heads_apart: bool,
        dtype: torch.dtype,
    ):
        self.inner = _Groups(groups, {"weight_decay": 0.0, MATRICES: False})
        self.adamw = adamw([group for group in self.inner.param_groups if not group[MATRICES]])
        self.momentum = momentum
        self.momentum_warmup_steps = momentum_warmup_steps
        self.equal_norms = equal_norms
        self.heads_apart = heads_apart
        self.dtype = dtype
        self.rounds: Sequence[MatrixRound] = ()
        self.weight_decays: dict[Tensor, float] = {}
        self._copies: Mapping[Tensor, Tensor] = {}
        self._steps = 0

    @property
    def copies(self) -> Mapping[Tensor, Tensor]:
        return self._copies

    @copies.setter
    def copies(self, copies: Mapping[Tensor, Tensor]) -> None:
        """Set when the groups hold the masters: `weight_decays` is made of them."""
        groups = [group for group in self.inner.param_groups if group[MATRICES]]
        self.weight_decays = {master: group["weight_decay"] for group in groups for master in group["params"]}
        self._copies = {master: copy for master, copy in copies.items() if master in self.weight_decays}
        self.adamw.copies = {master: copy for master, copy in copies.items() if master not in self.weight_decays}

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor) -> None:
        self.adamw.step(lr, divisor)
        momentum = self._momentum()
        self._steps += 1
        set_rates(self.inner, lr)
        for matrices in self.rounds:
            buffers, places = matrices.buffers(self.dtype)
            for span, place in zip(matrices.spans, places, strict=True):
                held, gradient = span.of(self.state_of(span.master)[MOMENTUM]), span.of(span.master.grad)
                muon_direction_(place, held, gradient, beta=momentum, divisor=divisor)
            whole = matrices.gather(buffers)
            del buffers, places  # before the iterations, whose temporaries are as large
            updates = matrices.scatter(self._orthogonal(whole) if len(whole) else whole)
            del whole
            for span, update in zip(matrices.spans, updates, strict=True):
                copy = self._copies.get(span.master)
                muon_apply_(
                    span.of(span.master),
                    update,
                    lr=lr,
                    scale=RMS * math.sqrt(max(span.shape)),
                    weight_decay=self.weight_decays[span.master],
                    divisor=divisor,
                    copy=None if copy is None else span.of(copy),
                )

    def _orthogonal(self, matrices: Tensor) -> Tensor:
        """O [n, rows, columns] of the directions `matrices`."""
        found = newton_schulz(matrices, ITERATIONS)
        if self.equal_norms:
            equalize_norms_(found)
        return found

    def _momentum(self) -> float:
        """mu of the next step."""
        if self._steps >= self.momentum_warmup_steps:
            return self.momentum
        first = min(FIRST_MOMENTUM, self.momentum)
        return first + (self.momentum - first) * self._steps / self.momentum_warmup_steps

    def undo(self) -> None:
        self._steps -= 1
        self.adamw.undo()

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        if master not in self.weight_decays:
            return self.adamw.state_of(master)
        state = self.inner.state[master]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(master, requires_grad=False)
        return {MOMENTUM: state[MOMENTUM]}

    def set_step(self, step: int) -> None:
        self._steps = step
        self.adamw.set_step(step)


def flops(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
    """FLOPs of the Newton-Schulz iterations of a matrix of `shape`, made in `dtype` on a GPU."""
    symmetric = dtype in op.HALF_TYPES and min(shape) >= op.LEAST_ROWS
    return op.flops(*shape, ITERATIONS, symmetric=symmetric)
