"""Gated linear attention on the fused projection: the public function and the operators registered for it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.gla import plain
from kernels.gla.check import check_gla, check_gla_values, check_update
from kernels.gla.features import form_features
from kernels.gla.inputs import GlaInputs, Saved, document_positions, key_width, parts, products
from kernels.gla.step import gla_step, gla_step_
from kernels.lightning.op import empty_starts, empty_state
from kernels.numerics import accumulation_dtype
from kernels.quantize.noted import note, slots
from kernels.quantize.op import note_plainly


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
    update_state: bool = False,
    noting: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The token mixer of TransNormerLLM between its two projections (arXiv 2307.14995, section 3.1).

        q, k = LRPE(act(q)), LRPE(act(k))       o = lightning_attention(q, k, v, decay)       y = o * u

    qkvu: [B, T, 4 H d], the fused projection, columns q | k | v | u, each head by head. Any strides whose last is 1 are
        read without a copy. fp64, fp32, bf16 or fp16.
    decay: [H], fp32 (or fp64). decay, cu_seqlens, initial_state and return_state: as in `lightning_attention`.
    theta: [H, 1, d], radians a position; None for a layer without LRPE. LRPE makes [x cos(theta t), x sin(theta t)] of
        x, so that states are [.., H, 2 d, d], and [.., H, d, d] without it.
    act: of q and k: a name of kernels/activations.
    gate: False for y = o, an ablation that does not use u.
    positions: the integers t, [T] or [B, T], rising by 1 within a row or document; None counts each from 0. The first
        value matters only with an initial or a final state. Values are checked only on CPU.
    update_state: write the final state over initial_state, which must be contiguous and, unless qkvu is fp64, fp32. For
        one token without gradients.
    noting: note the largest element of y, and in the backward pass of qkvu's gradient (kernels/quantize/noted.py).

    Returns y [B, T, H d]; the sum of o^2 over heads and columns [B, T] in fp32 (fp64 for fp64), an input of
    `add_scaled_simple_rms_norm` after summation over tensor-parallel ranks; and the final state, None unless
    return_state. qkvu, theta and initial_state get gradients from all three results.
    Raises ValueError naming the argument that does not fit.
    """
    check_gla(
        qkvu=qkvu,
        decay=decay,
        theta=theta,
        act=act,
        positions=positions,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    one_token = qkvu.shape[1] == 1 and initial_state is not None and cu_seqlens is None
    one_token = one_token and not _tracked(qkvu, theta, initial_state)
    if update_state:
        check_update(qkvu, initial_state, one_token)
        y, parts = gla_step_(qkvu, initial_state, decay, theta, act, gate, positions)
        return y, parts.sum(-1, keepdim=True), initial_state if return_state else None
    if one_token:
        y, square_sum, state = gla_step(qkvu, initial_state, decay, theta, act, gate, positions)
        return y, square_sum, state if return_state else None
    if theta is None or (initial_state is None and not return_state):
        if qkvu.is_cuda:
            positions = None  # without a state only differences of positions matter; on CPU they are still checked
    elif positions is None and cu_seqlens is not None:
        positions = document_positions(cu_seqlens, qkvu.shape[1])
    features = form_features(qkvu=qkvu, theta=theta, act=act, positions=positions, heads=decay.shape[0])
    y, square_sum, state, *_, bits = torch.ops.megatron_tn.gla_forward(
        qkvu, features, decay, theta, act, gate, positions, initial_state, cu_seqlens, return_state, noting
    )
    return note(y, bits), square_sum, state if return_state else None


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
    noting: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the sum of o^2, the final state (empty unless return_state); for the backward pass o (empty where y is o) and
    the segments' initial states; and y's largest element (empty unless noting). features: from `form_features`."""
    inputs = GlaInputs(qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens)
    bits = slots(qkvu, noting)
    if not qkvu.is_cuda:
        check_gla_values(decay, positions, cu_seqlens, inputs.total)
    if inputs.backend == "triton":
        from kernels.gla import passes

        y, square_sum, state, o, starts = passes.forward(
            inputs, features, return_state=return_state, largest=bits if noting else None
        )
    else:
        y, o, square_sum, state = plain.forward(inputs)
        y = y.flatten(2)
        state = state if return_state else state.new_empty(0)
        v = inputs.parts[2]
        starts = empty_starts(v, v, key_width(v, theta), cu_seqlens)
        note_plainly(y, bits)
    return y, square_sum, state, o if gate else o.new_empty(0), starts, bits


@_forward.register_fake
def _forward_fake(
    qkvu, features, decay, theta, act, gate, positions, initial_state, cu_seqlens, return_state, noting=False
):
    v = parts(qkvu, decay.shape[0])[2]
    key = key_width(v, theta)
    return (
        qkvu.new_empty(*v.shape[:2], v.shape[2] * v.shape[3]),
        qkvu.new_empty(v.shape[:2], dtype=accumulation_dtype(v.dtype)),
        empty_state(v, v, key, cu_seqlens, return_state),
        qkvu.new_empty(v.shape if gate else (0,)),
        empty_starts(v, v, key, cu_seqlens),
        slots(qkvu, noting),
    )


def gradients(
    inputs: GlaInputs,
    saved: Saved,
    *,
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    dstate: Tensor | None = None,
    exchange: Callable[[Tensor], Callable[[], Tensor]] | None = None,
    theta_wanted: bool,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkvu, of theta (empty unless wanted) and of the initial state (empty without one).

    dy, dsquare_sum, dstate: the gradients of gla's three results, None for zero.
    exchange: replaces dstate with context parallelism. Called with the initial state's gradient from this slice's y and
        sum of o^2; returns a function that waits for dstate. dq, which does not depend on dstate, is computed between
        the two calls.
    bits: zeros, int32 [SLOTS], to note the largest element of qkvu's gradient in.
    """
    v = inputs.parts[2]
    saved = saved._replace(o=saved.o.view(v.shape))
    dqkvu = torch.empty(inputs.qkvu.shape, dtype=v.dtype, device=v.device)
    given = {"dy": dy, "dsquare_sum": dsquare_sum, "dstate": dstate, "exchange": exchange, "dqkvu": dqkvu}
    if inputs.backend == "triton":
        from kernels.gla import passes

        dinitial, dtheta = passes.backward(inputs, saved, **given, theta_wanted=theta_wanted, largest=bits)
    else:
        dinitial, dtheta = plain.backward(inputs, saved, **given)
        if bits is not None:
            note_plainly(dqkvu, bits)
    wide = accumulation_dtype(v.dtype)
    dinitial = dinitial.new_empty(0, dtype=wide) if inputs.initial_state is None else dinitial.to(wide)
    dtheta = dtheta.to(inputs.theta.dtype) if theta_wanted else dqkvu.new_empty(0)
    return dqkvu, dtheta, dinitial


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
    noting: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `gradients`; and the largest element of qkvu's (empty unless noting)."""
    inputs = GlaInputs(qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens)
    saved = Saved(o=o, starts=starts, features=features, state=state)
    given = {"dy": dy, "dsquare_sum": dsquare_sum, "dstate": dstate, "theta_wanted": theta_wanted}
    bits = slots(qkvu, noting)
    return *gradients(inputs, saved, **given, bits=bits if noting else None), bits


@_backward.register_fake
def _backward_fake(
    dy, dsquare_sum, dstate, o, qkvu, decay, theta, act, gate, positions, initial_state, cu_seqlens, starts,
    features, state, theta_wanted, noting=False,
):  # fmt: skip
    v = parts(qkvu, decay.shape[0])[2]
    return (
        qkvu.new_empty(qkvu.shape),
        theta.new_empty(theta.shape) if theta_wanted else qkvu.new_empty(0),
        empty_state(v, v, key_width(v, theta), cu_seqlens, initial_state is not None),
        slots(qkvu, noting),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    qkvu, features, decay, theta, ctx.act, ctx.gate, positions, initial_state, cu_seqlens, *wanted = inputs
    ctx.state_wanted, ctx.noting = wanted
    y, _, state, o, starts, _ = output
    kept = state if ctx.state_wanted and theta is not None else None
    o = o if ctx.gate else y
    ctx.save_for_backward(qkvu, decay, theta, positions, initial_state, cu_seqlens, o, starts, features, kept)


def _differentiate(ctx, dy, dsquare_sum, dstate, *_):
    qkvu, decay, theta, positions, initial_state, cu_seqlens, o, starts, features, state = ctx.saved_tensors
    theta_wanted = theta is not None and ctx.needs_input_grad[3]
    dqkvu, dtheta, dinitial, bits = torch.ops.megatron_tn.gla_backward(
        dy, dsquare_sum, dstate if ctx.state_wanted else None, o, qkvu, decay, theta, ctx.act, ctx.gate, positions,
        initial_state, cu_seqlens, starts, features, state, theta_wanted, ctx.noting,
    )  # fmt: skip
    dtheta = dtheta if theta_wanted else None
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    # In the order of gla_forward's arguments.
    return note(dqkvu, bits), None, None, dtheta, None, None, None, dinitial, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron_tn.gla_forward)
def _forward_flops(qkvu_shape, features_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs) -> int:
    """4 B T H K d: k_t^T v_t and q_t S_t at every position, K the width of the features."""
    return 4 * products(qkvu_shape, decay_shape, theta_shape)


@register_flop_formula(torch.ops.megatron_tn.gla_backward)
def _backward_flops(dy, dsquare_sum, dstate, o, qkvu_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs):
    """Twice the forward FLOPs: two products for each forward product. Recomputed states are not counted."""
    return 8 * products(qkvu_shape, decay_shape, theta_shape)


def _tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
