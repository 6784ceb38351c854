"""Lightning attention with exponential decay: the public function and the operators behind it."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.lightning import chunked
from kernels.lightning.check import check_inputs, check_values
from kernels.lightning.configs import TILES, plan_segment
from kernels.numerics import accumulation_dtype

MAX_TRITON_WIDTH = 256


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention whose memory fades by exp(-decay) at every position (arXiv 2307.14995, equations 5-7).

        o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s

    unscaled and without a denominator. Equivalently S_t = exp(-r) S_{t-1} + k_t^T v_t and o_t = q_t S_t, starting from
    `initial_state`, which so adds exp(-r (t + 1)) q_t S_initial at index t. All exponents are <= 0 in every
    implementation; rates and carried states are fp32 (fp64 for fp64 inputs).

    q, k: [B, T, H, K]; v: [B, T, H, V], T >= 1. Strides are free but for a contiguous last dimension, so views of a
        fused projection need no copy. fp64, fp32, bf16 or fp16, all three the same.
    decay: [H], the rate r >= 0 a position, fp32 (or fp64); it gets no gradient.
    initial_state: [B, H, K, V], fp32 (or fp64).
    cu_seqlens: [n + 1] int32, on the inputs' device: 0, the ends of the packed documents in a row of B = 1, and T;
        repeat T at the end to keep the shape fixed. States are then [n, H, K, V], that of an empty document being its
        initial state or zero. No document sees another. Values are checked on CPU alone (a check would halt a GPU).
    return_state: also return the state after the last position, as initial_state is laid out.

    Returns o [B, T, H, V] in the inputs' type, or (o, state). Gradients reach q, k, v and initial_state, from o and
    from the state. In fp16 scores and states may pass 65504 on the way (they are wider or scaled), but an o beyond it
    comes out infinite: use bf16 where slow heads meet long sequences. Raises ValueError naming the argument that does
    not fit.
    """
    check_inputs(q, k, v, decay, initial_state, cu_seqlens)
    o, state, _ = torch.ops.megatron_tn.lightning_forward(q, k, v, decay, initial_state, cu_seqlens, return_state)
    return (o, state) if return_state else o


@torch.library.custom_op("megatron_tn::lightning_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state, and the states that the kernels' segments start from, for the backward pass."""
    # A state nobody wants is empty: at 1024 positions it would be a quarter of an output to write.
    if not q.is_cuda:
        check_values(decay, cu_seqlens, q.shape[1])
    if backend(q, v) == "triton":
        from kernels.lightning import launch

        return launch.forward(q, k, v, decay, initial_state, cu_seqlens, return_state)
    o, state = chunked.forward(q, k, v, decay, initial_state, cu_seqlens)
    return o, state if return_state else state.new_empty(0), empty_starts(q, v, q.shape[-1], cu_seqlens)


@_forward.register_fake
def _forward_fake(q, k, v, decay, initial_state, cu_seqlens, return_state):
    state = empty_state(q, v, q.shape[-1], cu_seqlens, return_state)
    return v.new_empty(v.shape), state, empty_starts(q, v, q.shape[-1], cu_seqlens)


@torch.library.custom_op("megatron_tn::lightning_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend(q, v) == "triton":
        from kernels.lightning import launch

        return launch.backward(do, dstate, q, k, v, decay, initial_state, cu_seqlens, starts)
    *gradients, dinitial = chunked.backward(do, dstate, q, k, v, decay, initial_state, cu_seqlens)
    return *gradients, dinitial if initial_state is not None else dinitial.new_empty(0)


@_backward.register_fake
def _backward_fake(do, dstate, q, k, v, decay, initial_state, cu_seqlens, starts):
    dinitial = empty_state(q, v, q.shape[-1], cu_seqlens, initial_state is not None)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # a state nobody used then costs no tensor of zeros
    *tensors, ctx.state_wanted = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, do, dstate, _):
    q, k, v, decay, initial_state, cu_seqlens, starts = ctx.saved_tensors
    if do is None:
        do = torch.zeros_like(v)
    if not ctx.state_wanted:
        dstate = None
    dq, dk, dv, dinitial = torch.ops.megatron_tn.lightning_backward(
        do, dstate, q, k, v, decay, initial_state, cu_seqlens, starts
    )
    if initial_state is None:
        dinitial = None
    else:
        dinitial = dinitial.to(initial_state.dtype)
    return dq, dk, dv, None, dinitial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron_tn.lightning_forward)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """4 B T H K V: the recurrence's two products a position, whatever chunk a kernel works in."""
    batch, total, heads, width = q_shape
    return 4 * batch * total * heads * width * v_shape[-1]


@register_flop_formula(torch.ops.megatron_tn.lightning_backward)
def _backward_flops(do_shape, dstate_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Two products for each of the forward's; recomputing the states is not counted."""
    return 2 * _forward_flops(q_shape, k_shape, v_shape)


def backend(q: Tensor, v: Tensor) -> str:
    """Which implementation runs for q [B, T, H, K] and v [B, T, H, V]."""
    unsupported = None
    if q.dtype == torch.float64:
        unsupported = "tensor cores' fp32 sums cannot serve float64 inputs"
    elif max(q.shape[-1], v.shape[-1]) > MAX_TRITON_WIDTH:
        unsupported = f"widths K={q.shape[-1]}, V={v.shape[-1]} exceed {MAX_TRITON_WIDTH}"
    return dispatch.choose("lightning_attention", q, unsupported)


def empty_state(q: Tensor, v: Tensor, key: int, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    """What a state [rows or documents, H, key, V] looks like; empty where it is not wanted."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[2], key, v.shape[3]) if wanted else (0,)
    return q.new_empty(shape, dtype=accumulation_dtype(q.dtype))


def empty_starts(q: Tensor, v: Tensor, key: int, cu_seqlens: Tensor | None) -> Tensor:
    """What the states that segments start from look like: [pieces, H, key, V], empty where nothing is cut.

    A function of shapes and device alone, since traced code must know it. q: [B, T, H, ...]; key: its features' width.
    """
    # Plain numbers: a compiler that traces with symbolic sizes fixes them here, as the plan below depends on each.
    batch, total, heads, key = (int(size) for size in (*q.shape[:3], key))
    shape = (0,)
    if q.is_cuda and q.dtype != torch.float64 and max(key, v.shape[-1]) <= MAX_TRITON_WIDTH:
        # A plan's tensors only say that they are on a GPU (planning/stand_ins.py), with one there or without.
        there = torch.cuda.is_available() and q.device.type == "cuda"
        capability = torch.cuda.get_device_capability(q.device)[0] if there else max(TILES)
        if capability >= min(TILES):
            segment = plan_segment(capability, q.element_size(), batch, total, heads, key, int(v.shape[-1]))
            pieces = batch * -(-total // segment) if cu_seqlens is None else total // segment + cu_seqlens.shape[0] - 1
            shape = (pieces, heads, key, v.shape[-1]) if segment < total else shape
    return q.new_empty(shape, dtype=torch.float32)
