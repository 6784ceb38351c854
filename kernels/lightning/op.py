"""Lightning attention with exponential decay: the public function and the operators registered for it."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.lightning import chunked
from kernels.lightning.check import check_inputs, check_values
from kernels.lightning.inputs import AttentionInputs
from kernels.lightning.sequences import piece_count, plan_segment
from kernels.lightning.tiles import TILES
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
    """Causal linear attention whose state decays by exp(-decay) per position (arXiv 2307.14995, equations 5-7).

        o_t = sum over s <= t of exp(-r (t - s)) (q_t . k_s) v_s

    without scale or denominator. Equivalently S_t = exp(-r) S_{t-1} + k_t^T v_t and o_t = q_t S_t, with S_{-1} =
    `initial_state`, which adds exp(-r (t + 1)) q_t S_{-1} to o_t. All exponents are <= 0 in every implementation; rates
    and states are fp32 (fp64 for fp64 inputs).

    q, k: [B, T, H, K]; v: [B, T, H, V], T >= 1; all three fp64, fp32, bf16 or fp16. Any strides with a contiguous last
        dimension are read without a copy, so views of a fused projection are.
    decay: [H], the rate r >= 0 per position, fp32 (or fp64); not differentiable.
    initial_state: [B, H, K, V], fp32 (or fp64).
    cu_seqlens: [n + 1] int32, on the inputs' device: 0 and the ends of n documents packed into a row of B = 1, the last
        T; repeat T at the end to keep the shape fixed. States are then [n, H, K, V]; an empty document's final state is
        its initial state. Documents do not attend to each other. Values are checked only on CPU (no host
        synchronisation on GPU).
    return_state: also return the state after the last position, shaped as initial_state.

    Returns o [B, T, H, V] in the inputs' type, or (o, state), both differentiable in q, k, v and initial_state. fp16:
    scores and states may exceed 65504 (they are kept wider, or scaled), but an element of o that does is infinite; use
    bf16 for slow heads with long sequences. Raises ValueError naming the argument that does not fit.
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
    """o; the final state, empty unless wanted (at T = 1024 writing it costs a quarter of writing o); and the segments'
    initial states, for the backward pass."""
    if not q.is_cuda:
        check_values(decay, cu_seqlens, q.shape[1])
    inputs = AttentionInputs(q, k, v, decay, initial_state, cu_seqlens)
    if backend(q, v) == "triton":
        from kernels.lightning import passes

        return passes.forward(inputs, return_state=return_state)
    o, state = chunked.forward(inputs)
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
    """The gradients of q, k, v and of the initial state, the last empty where there is none."""
    inputs = AttentionInputs(q, k, v, decay, initial_state, cu_seqlens)
    if backend(q, v) == "triton":
        from kernels.lightning import passes

        return passes.backward(inputs, do=do, dstate=dstate, starts=starts)
    *gradients, dinitial = chunked.backward(inputs, do=do, dstate=dstate)
    return *gradients, dinitial if initial_state is not None else dinitial.new_empty(0)


@_backward.register_fake
def _backward_fake(do, dstate, q, k, v, decay, initial_state, cu_seqlens, starts):
    dinitial = empty_state(q, v, q.shape[-1], cu_seqlens, initial_state is not None)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # None, not zeros, as the gradient of an unused state
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
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return dq, dk, dv, None, dinitial, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron_tn.lightning_forward)
def _forward_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """4 B T H K V: k_t^T v_t and q_t S_t at every position, for any chunk length."""
    batch, total, heads, width = q_shape
    return 4 * batch * total * heads * width * v_shape[-1]


@register_flop_formula(torch.ops.megatron_tn.lightning_backward)
def _backward_flops(do_shape, dstate_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Twice the forward FLOPs: two products for each forward product. Recomputed states are not counted."""
    return 2 * _forward_flops(q_shape, k_shape, v_shape)


def backend(q: Tensor, v: Tensor) -> str:
    """Which implementation runs for q [B, T, H, K] and v [B, T, H, V]."""
    unsupported = None
    if max(q.shape[-1], v.shape[-1]) > MAX_TRITON_WIDTH:
        unsupported = f"widths K={q.shape[-1]}, V={v.shape[-1]} exceed {MAX_TRITON_WIDTH}"
    return dispatch.choose("lightning_attention", q, unsupported)


def empty_state(q: Tensor, v: Tensor, key: int, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    """An uninitialised state [B or documents, H, key, V]; an empty tensor unless wanted. key: width of q's features."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[2], key, v.shape[3]) if wanted else (0,)
    return q.new_empty(shape, dtype=accumulation_dtype(q.dtype))


def empty_starts(q: Tensor, v: Tensor, key: int, cu_seqlens: Tensor | None) -> Tensor:
    """Uninitialised initial states of the segments, [pieces, H, key, V] fp32, empty where no sequence is cut.

    The shape depends only on shapes and the device, so that fake tensors have it too. q: [B, T, H, ...]; key: width of
    q's features.
    """
    # int() specialises torch.compile's symbolic sizes, because segment lengths depend on their values.
    batch, total, heads, key, value = (int(size) for size in (*q.shape[:3], key, v.shape[-1]))
    shape = (0,)
    if q.is_cuda and q.dtype != torch.float64 and max(key, value) <= MAX_TRITON_WIDTH:
        # A memory plan's fake tensors have is_cuda set, on a CPU device: use the newest architecture.
        there = torch.cuda.is_available() and q.device.type == "cuda"
        capability = torch.cuda.get_device_capability(q.device)[0] if there else max(TILES)
        if capability >= min(TILES):
            segment = plan_segment(
                capability=capability,
                element_bytes=q.element_size(),
                rows=batch,
                total=total,
                heads=heads,
                key=key,
                value=value,
            )
            documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if segment < total:
                shape = (piece_count(total, segment, rows=batch, documents=documents), heads, key, value)
    return q.new_empty(shape, dtype=torch.float32)
