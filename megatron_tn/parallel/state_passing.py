"""Context parallelism of decay attention: what crosses ranks is the state (LASP, arXiv 2404.02882; LASP-2, 2502.07563).

Ranks hold contiguous slices of a sequence. With S_j the state that slice j alone leaves behind and n_j its length, the
state that slice i starts from is

    sum over j < i of S_j prod over j < m < i of exp(-r n_m)

so one all-gather of [B, H, K, d] a layer, whatever the sequence's length, replaces an exchange of keys and values; the
gradient takes the same way back. A slice that a document boundary cuts off from its neighbour gets nothing from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import gla_features, gla_state
from megatron_tn.parallel.context import Axis


class SequenceSlice:
    """This rank's part of sequences of `length` tokens; slices differ by one token at most.

    start, stop: token range. cu_seqlens: the documents' bounds within the slice, [n + 1] as the sequence's own, the
    documents outside being empty; None for whole sequences.

    Raises:
        ValueError: fewer tokens than ranks.
    """

    def __init__(self, axis: Axis, length: int, cu_seqlens: Tensor | None, device: torch.device):
        if length < axis.size:
            raise ValueError(f"a sequence of {length} tokens cannot be cut into parallel.cp={axis.size} slices")
        self.axis = axis
        bounds = [length * rank // axis.size for rank in range(axis.size + 1)]
        self.start, self.stop = bounds[axis.rank], bounds[axis.rank + 1]
        self.lengths = torch.tensor(bounds, device=device).diff()
        self.cu_seqlens = None
        # Whether the document at a slice's end goes on in the next one, and whether it fills the slice.
        self.goes_on = torch.ones(axis.size - 1, device=device)
        self.fills = torch.ones(axis.size, device=device)
        if cu_seqlens is not None:
            self.cu_seqlens = (cu_seqlens - self.start).clamp(0, self.stop - self.start)
            edges = torch.tensor(bounds, device=device)
            first = _document_of(edges[:-1], cu_seqlens)
            last = _document_of(edges[1:] - 1, cu_seqlens)
            self.goes_on = (last[:-1] == first[1:]).float()
            self.fills = (first == last).float()
            self.first, self.last = first[axis.rank : axis.rank + 1], last[axis.rank : axis.rank + 1]

    @property
    def length(self) -> int:
        return self.stop - self.start

    def take(self, x: Tensor) -> Tensor:
        """x [..., N] -> this rank's [..., n]."""
        return x[..., self.start : self.stop]

    def weights(self, decay: Tensor) -> tuple[Tensor, Tensor]:
        """decay [H] -> of this rank's initial state, what each rank's own state contributes [cp, H]; and of this rank's
        own state, what it contributes to each rank's initial one [cp, H]."""
        rank, size = self.axis.rank, self.axis.size
        goes_on = torch.cat([self.goes_on, self.goes_on.new_zeros(1)])
        through = (self.fills * goes_on)[:, None] * torch.exp(-decay[None] * self.lengths[:, None])
        one = torch.ones_like(through[:1])
        before = torch.cat([one, through[1:rank].flip(0)]).cumprod(0)[:rank].flip(0) * goes_on[:rank, None]
        after = torch.cat([one, through[rank + 1 : size - 1]]).cumprod(0)[: size - 1 - rank] * goes_on[rank]
        nothing = torch.zeros_like(through)
        return torch.cat([before, nothing[rank:]]), torch.cat([nothing[: rank + 1], after])

    def incoming_state(
        self, qkvu: Tensor, decay: Tensor, theta: Tensor | None, act: str, positions: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The state that `kernels.gla` starts from on this rank, for the slice's projection qkvu [B, n, 4 H d], and
        `kernels.gla_features` of it, formed while states were on their way.

        [B, H, K, d], or with documents [documents, H, K, d]. Collective over the axis, as is its backward pass.
        """
        own = gla_state(qkvu, decay, theta, act=act, positions=positions, cu_seqlens=self.cu_seqlens)
        documents = own.shape[0]
        if self.cu_seqlens is not None:
            own = own.index_select(0, self.last)
        arriving = _start_gather(own.detach(), self.axis)
        features = gla_features(qkvu, decay, theta, act=act, positions=positions)
        incoming = _PassStates.apply(own, arriving, *self.weights(decay.to(own.dtype)), self.axis)
        if self.cu_seqlens is not None:
            incoming = incoming.new_zeros(documents, *incoming.shape[1:]).index_add(0, self.first, incoming)
        return incoming, features


class _PassStates(torch.autograd.Function):
    """From this rank's own state, and all ranks' in flight, to the one that it starts from."""

    @staticmethod
    def forward(ctx, own: Tensor, arriving: Tensor, received: Tensor, sent: Tensor, axis: Axis) -> Tensor:
        ctx.save_for_backward(sent)
        ctx.axis = axis
        return _combine(arriving, received)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _combine(_start_gather(gradient, ctx.axis), *ctx.saved_tensors), None, None, None, None


def _start_gather(state: Tensor, axis: Axis) -> Tensor:
    """Every rank's [B, H, K, d], [cp * B, H, K, d], on their way: `_combine` waits for them.

    Not dist.all_gather_into_tensor: a compiler can follow these operators, and whoever waits needs the tensor alone.
    """
    return torch.ops._c10d_functional.all_gather_into_tensor(state.contiguous(), axis.size, axis.name)


def _combine(arriving: Tensor, weights: Tensor) -> Tensor:
    """Every rank's [B, H, K, d], weighted by [cp, H] and summed."""
    states = torch.ops._c10d_functional.wait_tensor(arriving).unflatten(0, (weights.shape[0], -1))
    return torch.einsum("rh,rbhkv->bhkv", weights, states)


def _document_of(position: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True) - 1
