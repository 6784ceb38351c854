"""Context parallelism of decay attention: what crosses ranks is the state (LASP, arXiv 2404.02882; LASP-2, 2502.07563).

Ranks hold contiguous slices of a sequence. With S_j the state that slice j alone leaves behind and n_j its length, the
state that slice i starts from is

    sum over j < i of S_j prod over j < m < i of exp(-r n_m)

so one all-gather of [B, H, K, d] a layer, whatever the sequence's length, replaces an exchange of keys and values; the
gradient takes the same way back. A slice that a document boundary cuts off from its neighbour gets nothing from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import gla_features, gla_gradients, gla_query_features_, gla_state
from kernels.numerics import in_own_types
from megatron_tn.parallel.context import Axis

collectives = torch.ops._c10d_functional


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
        self.edges = None  # the documents that the slice begins and ends in
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
            self.edges = torch.stack([first[axis.rank], last[axis.rank]])

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

    def attend(
        self, qkvu: Tensor, decay: Tensor, theta: Tensor | None, *, act: str, gate: bool, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`kernels.gla` on this slice's projection qkvu [B, n, 4 H d], as a part of its sequence: y and the sum of o^2.

        Collective over the axis, as is its backward pass.
        """
        weights = self.weights(decay.to(torch.promote_types(qkvu.dtype, torch.float32)))
        return _SliceAttention.apply(
            qkvu, decay, theta, act, gate, positions, self.cu_seqlens, *weights, self.edges, self.axis
        )


class _SliceAttention(torch.autograd.Function):
    """States, and backward their gradients, are on their way while the rank goes on with what needs none of them:

    forward: features of k, own state, [gather: features of q], o
    backward: gradient of o, own part of the initial state's, [gather: dq], dk and dv, from there through the features
    """

    @staticmethod
    def forward(ctx, qkvu, decay, theta, act, gate, positions, cu_seqlens, received, sent, edges, axis):
        features = gla_features(qkvu, decay, theta, act=act, positions=positions, keys_alone=True)
        own = gla_state(qkvu, decay, theta, act=act, positions=positions, cu_seqlens=cu_seqlens, features=features)
        # Not dist.all_gather_into_tensor: a compiler can follow these operators.
        arriving = collectives.all_gather_into_tensor(_pick(own, edges, 1), axis.size, axis.name)
        gla_query_features_(features, qkvu, theta, act=act, positions=positions)
        initial = _combine(collectives.wait_tensor(arriving), received)
        y, square_sum, state, o, starts = torch.ops.megatron_tn.gla_forward(
            qkvu,
            features,
            decay,
            theta,
            act,
            gate,
            positions,
            _place(initial, edges, 0, cu_seqlens),
            cu_seqlens,
            theta is not None,
        )
        ctx.act, ctx.gate, ctx.group = act, gate, axis.name
        o = o if gate else y
        state = None if theta is None else _pick(state, edges, 1)
        ctx.save_for_backward(
            o, qkvu, decay, theta, positions, initial, cu_seqlens, starts, features, state, sent, edges
        )
        return y, square_sum

    @staticmethod
    def backward(ctx, dy, dsquare_sum):
        o, qkvu, decay, theta, *rest = ctx.saved_tensors
        theta_wanted = theta is not None and ctx.needs_input_grad[2]
        dqkvu, dtheta = torch.ops.megatron_tn.gla_slice_backward(
            dy, dsquare_sum, o, qkvu, decay, theta, ctx.act, ctx.gate, *rest, ctx.group, theta_wanted
        )
        return dqkvu, None, dtheta if theta_wanted else None, *[None] * 8


@torch.library.custom_op("megatron_tn::gla_slice_backward", mutates_args=())
def _slice_backward(
    dy: Tensor,
    dsquare_sum: Tensor,
    o: Tensor,
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor | None,
    starts: Tensor,
    features: Tensor | None,
    state: Tensor | None,
    sent: Tensor,
    edges: Tensor | None,
    group: str,
    theta_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of qkvu and of theta (empty where it is not wanted). One operator, its exchange included."""
    ranks = dist.distributed_c10d._resolve_process_group(group)

    def exchange(own: Tensor) -> Callable[[], Tensor]:
        leaving = _pick(own, edges, 0)
        gathered = leaving.new_empty(ranks.size() * leaving.shape[0], *leaving.shape[1:])
        work = dist.all_gather_into_tensor(gathered, leaving.contiguous(), group=ranks, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return _place(_combine(gathered, sent), edges, 1, cu_seqlens)

        return arrived

    initial_state = _place(initial_state, edges, 0, cu_seqlens)
    state = None if state is None else _place(state, edges, 1, cu_seqlens)
    dqkvu, dtheta, _ = gla_gradients(
        dy, dsquare_sum, exchange, o, qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens, starts,
        features, state, theta_wanted,
    )  # fmt: skip
    return dqkvu, dtheta


@_slice_backward.register_fake
def _slice_backward_fake(dy, dsquare_sum, o, qkvu, decay, theta, act, gate, *rest):
    return qkvu.new_empty(qkvu.shape), theta.new_empty(theta.shape) if rest[-1] else qkvu.new_empty(0)


@register_flop_formula(torch.ops.megatron_tn.gla_slice_backward)
def _slice_backward_flops(dy, dsquare_sum, o, qkvu_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs):
    """Four products of B T H K d multiplications, and another for the initial state's gradient on its own."""
    batch, tokens, fused = qkvu_shape
    width = fused // 4 // decay_shape[0]
    return 10 * batch * tokens * decay_shape[0] * width * width * (1 if theta_shape is None else 2)


@in_own_types
def _combine(gathered: Tensor, weights: Tensor) -> Tensor:
    """Every rank's [B, H, K, d], one after the other, weighted by [cp, H] and summed."""
    states = gathered.unflatten(0, (weights.shape[0], -1))
    return torch.einsum("rh,rbhkv->bhkv", weights, states)


# What crosses an edge of a slice is the state of one document, [1, H, K, d], and that is what is kept for the backward
# pass: those of all documents could take more memory than the activations. edges is None for whole sequences.


def _pick(states: Tensor, edges: Tensor | None, edge: int) -> Tensor:
    """Of the documents' states, that of the one at the slice's beginning (edge 0) or end (1)."""
    return states if edges is None else states.index_select(0, edges[edge : edge + 1])


def _place(state: Tensor, edges: Tensor | None, edge: int, cu_seqlens: Tensor | None) -> Tensor:
    """The reverse: all other documents' are zero."""
    if edges is None:
        return state
    states = state.new_zeros(cu_seqlens.shape[0] - 1, *state.shape[1:])
    return states.index_copy_(0, edges[edge : edge + 1], state)


def _document_of(position: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True) - 1
