"""Gated linear attention with context parallelism: ranks hold slices of one sequence and exchange states.

LASP (arXiv 2404.02882), LASP-2 (2502.07563): a rank's initial state is a weighted sum of the previous ranks' final
states, each computed from zero; the gradient of its final state is a weighted sum of the next ranks' initial-state
gradients. Each is one all-gather of [B, H, K, d] per layer, started early and waited for late:

    forward: features of k; own final state; start all-gather; features of q; wait; y
    backward: do; gradient of own initial state; start all-gather; dq; wait; dk, dv; dqkvu through the features

With packed documents, only the slice's first and last document can cross its edges. Only their states, [1, H, K, d],
are exchanged and saved; the states of all documents could take more memory than the activations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import kernels.gla.state  # noqa: F401 (registers the operator gla_state)
from kernels.gla.check import check_gla
from kernels.gla.features import add_query_features_, form_features
from kernels.gla.inputs import GlaInputs, Saved, products
from kernels.gla.op import gradients
from kernels.numerics import in_own_types

collectives = torch.ops._c10d_functional
BEGINNING, END = 0, 1  # the edges of a slice


class StateExchange(NamedTuple):
    """Weights and process group of the exchange of states between the ranks of a sequence.

    received: [ranks, H], the weight of each rank's own final state in this rank's initial state.
    sent: [ranks, H], the weight of this rank's own final state in each rank's initial state.
    edges: [2], indices of the slice's first and last document; None without packed documents.
    group: name of the process group. ranks: its size.
    """

    received: Tensor
    sent: Tensor
    edges: Tensor | None
    group: str
    ranks: int


def gla_slice(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None = None,
    *,
    act: str,
    gate: bool = True,
    positions: Tensor,
    cu_seqlens: Tensor | None = None,
    exchange: StateExchange,
) -> tuple[Tensor, Tensor]:
    """`gla` on a slice of T positions of every sequence: y [B, T, H d] and the sum of o^2 [B, T].

    Arguments as in `gla`; positions: in the whole sequence or document; cu_seqlens: document bounds within the slice.
    Differentiable in qkvu and theta. Forward and backward pass are collective over the group.
    Raises ValueError naming the argument that does not fit.
    """
    check_gla(
        qkvu=qkvu,
        decay=decay,
        theta=theta,
        act=act,
        positions=positions,
        initial_state=None,
        cu_seqlens=cu_seqlens,
    )
    return _Slice.apply(qkvu, decay, theta, act, gate, positions, cu_seqlens, *exchange)


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvu, decay, theta, act, gate, positions, cu_seqlens, received, sent, edges, group, ranks):
        heads = decay.shape[0]
        features = form_features(qkvu=qkvu, theta=theta, act=act, positions=positions, heads=heads, keys_alone=True)
        own = torch.ops.megatron_tn.gla_state(qkvu, features, decay, theta, act, positions, None, cu_seqlens)
        # The functional form of the collective, which torch.compile can trace.
        gathered = collectives.all_gather_into_tensor(_of_edge(own, edges, END), ranks, group)
        add_query_features_(features, qkvu=qkvu, theta=theta, act=act, positions=positions)
        initial = _combine(collectives.wait_tensor(gathered), received)
        y, square_sum, state, o, starts, _ = torch.ops.megatron_tn.gla_forward(
            qkvu,
            features,
            decay,
            theta,
            act,
            gate,
            positions,
            _of_all_documents(initial, edges, BEGINNING, cu_seqlens),
            cu_seqlens,
            theta is not None,
        )
        ctx.act, ctx.gate, ctx.group = act, gate, group
        o = o if gate else y
        state = None if theta is None else _of_edge(state, edges, END)
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
        return dqkvu, None, dtheta if theta_wanted else None, *[None] * 9


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
    """dqkvu and dtheta (empty unless wanted), including the exchange of the states' gradients.

    initial_state, state: initial state of the slice's first document, final state of its last one. group: name of the
    process group.
    """
    ranks = dist.distributed_c10d._resolve_process_group(group)

    def exchange(own: Tensor) -> Callable[[], Tensor]:
        own = _of_edge(own, edges, BEGINNING)
        gathered = own.new_empty(ranks.size() * own.shape[0], *own.shape[1:])
        work = dist.all_gather_into_tensor(gathered, own.contiguous(), group=ranks, async_op=True)

        def gradient_of_final_state() -> Tensor:
            work.wait()
            return _of_all_documents(_combine(gathered, sent), edges, END, cu_seqlens)

        return gradient_of_final_state

    initial_state = _of_all_documents(initial_state, edges, BEGINNING, cu_seqlens)
    state = None if state is None else _of_all_documents(state, edges, END, cu_seqlens)
    inputs = GlaInputs(qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens)
    saved = Saved(o=o, starts=starts, features=features, state=state)
    dqkvu, dtheta, _ = gradients(
        inputs, saved, dy=dy, dsquare_sum=dsquare_sum, exchange=exchange, theta_wanted=theta_wanted
    )
    return dqkvu, dtheta


@_slice_backward.register_fake
def _slice_backward_fake(dy, dsquare_sum, o, qkvu, decay, theta, act, gate, *rest):
    theta_wanted = rest[-1]
    return qkvu.new_empty(qkvu.shape), theta.new_empty(theta.shape) if theta_wanted else qkvu.new_empty(0)


@register_flop_formula(torch.ops.megatron_tn.gla_slice_backward)
def _slice_backward_flops(dy, dsquare_sum, o, qkvu_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs):
    """10 B T H K d: four products of 2 B T H K d, and a fifth for the separate initial-state gradient."""
    return 10 * products(qkvu_shape, decay_shape, theta_shape)


@in_own_types
def _combine(gathered: Tensor, weights: Tensor) -> Tensor:
    """All ranks' states [ranks * B, H, K, d], weighted by [ranks, H] and summed over ranks: [B, H, K, d]."""
    states = gathered.unflatten(0, (weights.shape[0], -1))
    return torch.einsum("rh,rbhkv->bhkv", weights, states)


def _of_edge(states: Tensor, edges: Tensor | None, edge: int) -> Tensor:
    """The state [1, H, K, d], out of `states` [n, H, K, d], of the document at an edge of the slice; all states without
    packed documents."""
    return states if edges is None else states.index_select(0, edges[edge : edge + 1])


def _of_all_documents(state: Tensor, edges: Tensor | None, edge: int, cu_seqlens: Tensor | None) -> Tensor:
    """The inverse of `_of_edge`, with zero states for all other documents."""
    if edges is None:
        return state
    states = state.new_zeros(cu_seqlens.shape[0] - 1, *state.shape[1:])
    return states.index_copy_(0, edges[edge : edge + 1], state)
