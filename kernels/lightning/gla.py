"""Gated linear attention on the fused projection: the public functions and the operators behind them."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.lightning import gla_plain
from kernels.lightning.check import check_features, check_gla, check_positions, check_values
from kernels.lightning.fused import Exchange, backend, document_positions, parts
from kernels.lightning.op import empty_starts, empty_state
from kernels.lightning.step import gla_step
from kernels.numerics import accumulation_dtype


def gla(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None = None,
    *,
    act: str,
    gate: bool = True,
    positions: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The token mixer of TransNormerLLM between its two projections (arXiv 2307.14995, section 3.1).

        q, k = LRPE(act(q)), LRPE(act(k))       o = lightning_attention(q, k, v, decay)       y = o * u

    qkvu: [B, T, 4 H d], the fused projection, its rows q | k | v | u and each of them head by head. Any strides whose
        last is 1: nothing is copied, and its gradient is one tensor too.
    decay: [H], fp32 (or fp64), as in `lightning_attention`, whose cu_seqlens, initial_state and return_state these are.
    theta: [H, 1, d], radians a position; None for a layer without LRPE. With it x becomes [x cos(theta t), x sin(theta
        t)], so that states are [.., H, 2d, d].
    act: of q and k: "silu", "none" or "1+elu".
    gate: False for y = o, an ablation in which u has no part.
    positions: the t, integers, [T] or [B, T], which rise by 1 within a row or document; None counts each from 0. Only a
        state that comes in or goes out depends on where they start. Values are checked on CPU alone.
    features: of `gla_features` with the same positions, where they were formed ahead of an initial_state that was on
        its way.

    Returns y [B, T, H d], the sum over heads and widths of o^2 [B, T] in fp32 (fp64 for fp64), which
    `add_scaled_simple_rms_norm` wants once it is summed over ranks, and the final state, None unless asked for.
    Gradients reach qkvu, theta and initial_state from all three. theta's is formed from differences of positions, not
    as a sum of terms of t.
    Raises ValueError naming the argument that does not fit.
    """
    check_gla(qkvu, decay, theta, act, positions, initial_state, cu_seqlens)
    one_token = qkvu.shape[1] == 1 and initial_state is not None and cu_seqlens is None
    if one_token and not _tracked(qkvu, theta, initial_state):
        y, square_sum, state = gla_step(qkvu, initial_state, decay, theta, act, gate, positions)
        return y, square_sum, state if return_state else None
    positions_matter = theta is not None and (initial_state is not None or return_state)
    packed = positions_matter and cu_seqlens is not None
    check_features(features, qkvu, decay.shape[0], theta is not None, positions, packed)
    if packed and positions is None:
        positions = document_positions(cu_seqlens, qkvu.shape[1])
    elif not positions_matter and features is None and qkvu.is_cuda:
        positions = None  # only distances do
    if features is None:
        features = gla_features(qkvu, decay, theta, act=act, positions=positions)
    y, square_sum, state, *_ = torch.ops.megatron_tn.gla_forward(
        qkvu, features, decay, theta, act, gate, positions, initial_state, cu_seqlens, return_state
    )
    return y, square_sum, state if return_state else None


def gla_features(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None = None,
    *,
    act: str,
    positions: Tensor | None = None,
    keys_alone: bool = False,
) -> Tensor | None:
    """What `gla` forms of q and k before it looks at a state; its arguments, its own form. None where there is nothing.

    An operator of its own, whose result selective recomputation need not keep. It has no gradient: gla's runs back
    through the features to qkvu, for which one gradient is enough. keys_alone: leave those of q to
    `gla_query_features_`; a state needs none. positions: None counts through the row, whatever is packed into it.
    """
    if act == "none" and theta is None:
        return None
    fixed = None if theta is None else theta.detach()
    return torch.ops.megatron_tn.gla_features(qkvu.detach(), fixed, act, positions, decay.shape[0], keys_alone)


def gla_query_features_(
    features: Tensor | None,
    qkvu: Tensor,
    theta: Tensor | None = None,
    *,
    act: str,
    positions: Tensor | None = None,
) -> None:
    """Put those of q into the features that `gla_features` made with keys_alone from the same arguments."""
    if features is not None:
        fixed = None if theta is None else theta.detach()
        torch.ops.megatron_tn.gla_query_features_(features, qkvu.detach(), fixed, act, positions)


@torch.library.custom_op("megatron_tn::gla_features", mutates_args=())
def _features(
    qkvu: Tensor, theta: Tensor | None, act: str, positions: Tensor | None, heads: int, keys_alone: bool = False
) -> Tensor:
    """The features of q and k, [B, T, 2, H, d or 2 d]; empty where plain PyTorch runs, which keeps none."""
    v = parts(qkvu, heads)[2]
    if backend(v, theta) == "triton":
        from kernels.lightning.launch_gla import FeatureMap

        return FeatureMap(heads, act, theta, positions).apply(qkvu, queries=not keys_alone)
    return _empty_features(v, theta)


@torch.library.custom_op("megatron_tn::gla_query_features_", mutates_args=("features",))
def _query_features_(features: Tensor, qkvu: Tensor, theta: Tensor | None, act: str, positions: Tensor | None) -> None:
    # Plain PyTorch keeps none, though room for them may be there (_empty_features).
    if features.numel() and backend(parts(qkvu, features.shape[3])[2], theta) == "triton":
        from kernels.lightning.launch_gla import FeatureMap

        FeatureMap(features.shape[3], act, theta, positions).apply(qkvu, features, keys=False)


@_features.register_fake
def _features_fake(qkvu, theta, act, positions, heads, keys_alone=False):
    return _empty_features(parts(qkvu, heads)[2], theta)


@_query_features_.register_fake
def _query_features_fake(features, qkvu, theta, act, positions):
    return None


@torch.library.custom_op("megatron_tn::gla_forward", mutates_args=())
def _forward(
    qkvu: Tensor,
    features: Tensor | None,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the sum of o^2, the final state; for the backward pass o (empty where y is o) and what segments start from.

    features: of gla_features, None where q and k are their own.
    """
    if not qkvu.is_cuda:
        check_values(decay, cu_seqlens, qkvu.shape[1])
        check_positions(positions, cu_seqlens, qkvu.shape[1])
    q, k, v, u = parts(qkvu, decay.shape[0])
    if backend(v, theta) == "triton":
        from kernels.lightning import launch
        from kernels.lightning.triton_gate import gate as apply_gate

        if features is not None:
            q, k = features.unbind(2)
        o, state, starts = launch.forward(q, k, v, decay, initial_state, cu_seqlens, return_state)
        y, square_sum = apply_gate(o.flatten(2), u.flatten(2), gate)
    else:
        o, y, square_sum, state = gla_plain.forward(
            q, k, v, u, decay, theta, act, gate, positions, initial_state, cu_seqlens
        )
        y = y.flatten(2)
        state = state if return_state else state.new_empty(0)
        starts = empty_starts(v, v, _key(v, theta), cu_seqlens)
    return y, square_sum, state, o if gate else o.new_empty(0), starts


@_forward.register_fake
def _forward_fake(qkvu, features, decay, theta, act, gate, positions, initial_state, cu_seqlens, return_state):
    v = parts(qkvu, decay.shape[0])[2]
    key = _key(v, theta)
    return (
        qkvu.new_empty(*v.shape[:2], v.shape[2] * v.shape[3]),
        qkvu.new_empty(v.shape[:2], dtype=accumulation_dtype(v.dtype)),
        empty_state(v, v, key, cu_seqlens, return_state),
        qkvu.new_empty(v.shape if gate else (0,)),
        empty_starts(v, v, key, cu_seqlens),
    )


def gla_gradients(
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    dstate: Tensor | Exchange | None,
    o: Tensor,
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    features: Tensor | None,
    state: Tensor | None,
    theta_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """gla's backward pass: the gradients of qkvu, of theta and of the initial state, the last two empty without one.

    dstate: of the final state; None for zero; or, where slices of a sequence lie on several ranks, the exchange that
    gives it, begun before dq is formed and waited for after.
    o: [B, T, H, d], or flat. features: of gla_features. starts, state: what the forward pass returned; state is for a
    theta with dstate.
    """
    q, k, v, u = parts(qkvu, decay.shape[0])
    o = o.view(v.shape)
    dqkvu = torch.empty(qkvu.shape, dtype=qkvu.dtype, device=qkvu.device)
    dq, dk, dv, du = parts(dqkvu, decay.shape[0])
    if backend(v, theta) == "triton":
        from kernels.lightning import launch_gla
        from kernels.lightning.triton_gate import gate_gradient

        do = gate_gradient(dy, dsquare_sum, o.flatten(2), u.flatten(2), du.flatten(2), gate).view(v.shape)
        feature_map = launch_gla.FeatureMap(decay.shape[0], act, theta, positions)
        dinitial, dtheta = launch_gla.backward(
            do, dstate, qkvu, dqkvu, (q, k, v), (dq, dk, dv), features, decay,
            feature_map, initial_state, cu_seqlens, starts, state, theta_wanted,
        )  # fmt: skip
    else:
        dinitial, dtheta = gla_plain.backward(
            None if dy is None else dy.view(v.shape), dsquare_sum, dstate, o, q, k, v, u, decay, theta, act, gate,
            positions, initial_state, cu_seqlens, (dq, dk, dv, du),
        )  # fmt: skip
    if initial_state is None:
        dinitial = dinitial.new_empty(0, dtype=accumulation_dtype(v.dtype))
    dtheta = qkvu.new_empty(0) if dtheta is None or not theta_wanted else dtheta.to(theta.dtype)
    return dqkvu, dtheta, dinitial.to(accumulation_dtype(v.dtype))


@torch.library.custom_op("megatron_tn::gla_backward", mutates_args=())
def _backward(
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    dstate: Tensor | None,
    o: Tensor,
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    features: Tensor | None,
    state: Tensor | None,
    theta_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return gla_gradients(
        dy, dsquare_sum, dstate, o, qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens, starts,
        features, state, theta_wanted,
    )  # fmt: skip


@_backward.register_fake
def _backward_fake(
    dy, dsquare_sum, dstate, o, qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens, starts,
    features, state, theta_wanted,
):  # fmt: skip
    v = parts(qkvu, decay.shape[0])[2]
    return (
        qkvu.new_empty(qkvu.shape),
        theta.new_empty(theta.shape) if theta_wanted else qkvu.new_empty(0),
        empty_state(v, v, _key(v, theta), cu_seqlens, initial_state is not None),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    qkvu, features, decay, theta, ctx.act, ctx.gate, positions, initial_state, cu_seqlens, ctx.state_wanted = inputs
    y, _, state, o, starts = output
    kept = state if ctx.state_wanted and theta is not None else None
    o = o if ctx.gate else y
    ctx.save_for_backward(qkvu, decay, theta, positions, initial_state, cu_seqlens, o, starts, features, kept)


def _differentiate(ctx, dy, dsquare_sum, dstate, *_):
    qkvu, decay, theta, positions, initial_state, cu_seqlens, o, starts, features, state = ctx.saved_tensors
    theta_wanted = theta is not None and ctx.needs_input_grad[3]
    dqkvu, dtheta, dinitial = torch.ops.megatron_tn.gla_backward(
        dy, dsquare_sum, dstate if ctx.state_wanted else None, o, qkvu, decay, theta, ctx.act, ctx.gate, positions,
        initial_state, cu_seqlens, starts, features, state, theta_wanted,
    )  # fmt: skip
    if initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    return (
        dqkvu,
        None,
        None,
        dtheta if theta_wanted else None,
        None,
        None,
        None,
        None if initial_state is None else dinitial,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron_tn.gla_forward)
def _forward_flops(qkvu_shape, features_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs) -> int:
    """4 B T H K d with K the features' width: the recurrence's two products a position."""
    batch, total, fused = qkvu_shape
    width = fused // 4 // decay_shape[0]
    return 4 * batch * total * decay_shape[0] * width * width * (1 if theta_shape is None else 2)


@register_flop_formula(torch.ops.megatron_tn.gla_backward)
def _backward_flops(dy, dsquare_sum, dstate, o, qkvu_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs):
    """Two products for each of the forward's; finding states again is not counted."""
    return 2 * _forward_flops(qkvu_shape, None, decay_shape, theta_shape)


def _tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _key(v: Tensor, theta: Tensor | None) -> int:
    return v.shape[-1] * (1 if theta is None else 2)


def _empty_features(v: Tensor, theta: Tensor | None) -> Tensor:
    """What the features that a kernel makes look like; plain PyTorch keeps none."""
    if not v.is_cuda or v.dtype == torch.float64:
        return v.new_empty(0)
    batch, total, heads, _ = v.shape
    return v.new_empty(batch, total, 2, heads, _key(v, theta))
