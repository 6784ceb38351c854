"""Context parallelism of decay attention: ranks exchange states, not keys and values (LASP, arXiv 2404.02882; LASP-2,
arXiv 2502.07563).

Each rank holds a contiguous slice of the sequence. With S_j the final state of slice j computed from a zero initial
state, n_j its length and r the decay rate, slice i starts from

    S_0 exp(-r (n_1 + .. + n_{i-1})) + .. + S_{i-2} exp(-r n_{i-1}) + S_{i-1}

so a layer needs one all-gather of states [B, H, K, d], whatever the sequence's length, and its backward pass one of
their gradients. Terms from before the document that slice i begins in have weight zero.
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
    """This rank's slice [start, stop) of sequences of `length` tokens. Slices differ in length by at most one token.

    cu_seqlens: the documents' bounds counted from the slice's start, [documents + 1] as in the sequence, documents
        outside the slice being empty; None where each sequence is one document.
    edges: indices of the documents that the slice's first and last token belong to, int64 [2]; None likewise.

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
        self.edges = None
        # 1 where the document at the end of slice i goes on in slice i + 1, and 1 where one document fills slice i.
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
        """decay [H] -> received and sent, [cp, H] each. For slice j: the weight of S_j in this slice's initial state,
        and the weight of this slice's S in the initial state of slice j."""
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
        """`kernels.gla` of this slice of a sequence: qkvu [B, n, 4 H d] -> y [B, n, H d] and the sum of o^2 [B, n].

        positions: int64 [n], of this slice's tokens in their documents. Collective over the axis, forward and backward.
        """
        weights = self.weights(decay.to(torch.promote_types(qkvu.dtype, torch.float32)))
        return _SliceAttention.apply(
            qkvu, decay, theta, act, gate, positions, self.cu_seqlens, *weights, self.edges, self.axis
        )


class _SliceAttention(torch.autograd.Function):
    """The all-gather of states, or of their gradients, runs while the rank computes what stands in brackets:

    forward: features of k; S; all-gather of S [features of q]; initial state; o
    backward: do; this slice's gradient of its initial state; all-gather of it [dq]; gradient of S; dk, dv; dqkvu
    """

    @staticmethod
    def forward(ctx, qkvu, decay, theta, act, gate, positions, cu_seqlens, received, sent, edges, axis):
        features = gla_features(qkvu, decay, theta, act=act, positions=positions, keys_alone=True)
        own = gla_state(qkvu, decay, theta, act=act, positions=positions, cu_seqlens=cu_seqlens, features=features)
        # The functional form of the collective, which torch.compile can trace.
        gathered = collectives.all_gather_into_tensor(_pick(own, edges, 1), axis.size, axis.name)
        gla_query_features_(features, qkvu, theta, act=act, positions=positions)
        initial = _combine(collectives.wait_tensor(gathered), received)
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
    """The gradients of qkvu and theta ([0] unless theta_wanted), including the all-gather of states' gradients.

    sent: of `SequenceSlice.weights`.
    """
    ranks = dist.distributed_c10d._resolve_process_group(group)

    def exchange(own: Tensor) -> Callable[[], Tensor]:
        own = _pick(own, edges, 0)
        gathered = own.new_empty(ranks.size() * own.shape[0], *own.shape[1:])
        work = dist.all_gather_into_tensor(gathered, own.contiguous(), group=ranks, async_op=True)

        def gradient_of_final_state() -> Tensor:
            work.wait()
            return _place(_combine(gathered, sent), edges, 1, cu_seqlens)

        return gradient_of_final_state

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
    """Four products of B T H K d multiply-adds, and a fifth for the gradient of the initial state."""
    batch, tokens, fused = qkvu_shape
    width = fused // 4 // decay_shape[0]
    return 10 * batch * tokens * decay_shape[0] * width * width * (1 if theta_shape is None else 2)


@in_own_types
def _combine(gathered: Tensor, weights: Tensor) -> Tensor:
    """gathered [cp B, H, K, d], weights [cp, H] -> the weighted sum over ranks [B, H, K, d]."""
    states = gathered.unflatten(0, (weights.shape[0], -1))
    return torch.einsum("rh,rbhkv->bhkv", weights, states)


# Packed documents have a state each, [documents, H, K, d]. The state of one of them, [1, H, K, d], crosses an edge of a
# slice. Ranks exchange that one and keep it for the backward pass: all states could be larger than the activations.


def _pick(states: Tensor, edges: Tensor | None, edge: int) -> Tensor:
    """states [documents, H, K, d] -> that of the document at the slice's first token (edge 0) or last token (edge 1),
    [1, H, K, d]; all states where edges is None."""
    return states if edges is None else states.index_select(0, edges[edge : edge + 1])


def _place(state: Tensor, edges: Tensor | None, edge: int, cu_seqlens: Tensor | None) -> Tensor:
    """The reverse of `_pick`: state [1, H, K, d] -> [documents, H, K, d], zero for the other documents."""
    if edges is None:
        return state
    states = state.new_zeros(cu_seqlens.shape[0] - 1, *state.shape[1:])
    return states.index_copy_(0, edges[edge : edge + 1], state)


def _document_of(position: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True) - 1
