"""The final state of lightning attention alone, which a rank of a context-parallel group needs before its output."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.lightning import chunked, gla_plain
from kernels.lightning.check import check_features, check_gla, check_inputs, check_positions, check_values
from kernels.lightning.fused import backend, document_positions, parts
from kernels.lightning.gla import gla_features
from kernels.lightning.op import backend as plain_backend
from kernels.lightning.op import empty_state


def lightning_state(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The state that `lightning_attention` returns, without its output: sum over t of exp(-r (T - 1 - t)) k_t^T v_t.

    Arguments as there. Returns [B, H, K, V], or [documents, H, K, V], in fp32 (fp64 for fp64). Of a fast head only what
    has not faded is read. Gradients reach k, v and initial_state. Raises ValueError naming the argument that does not
    fit.
    """
    check_inputs(k, k, v, decay, initial_state, cu_seqlens)
    return torch.ops.megatron_tn.lightning_state(k, v, decay, initial_state, cu_seqlens)


def gla_state(
    qkvu: Tensor,
    decay: Tensor,
    theta: Tensor | None = None,
    *,
    act: str,
    positions: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """The state that `gla` returns, without its output; arguments as there. It has no gradient: what a final state is
    for enters `gla_gradients`. features: of `gla_features`, those of q unused."""
    check_gla(qkvu, decay, theta, act, positions, initial_state, cu_seqlens)
    packed = theta is not None and cu_seqlens is not None
    check_features(features, qkvu, decay.shape[0], theta is not None, positions, packed)
    if positions is None and packed:
        positions = document_positions(cu_seqlens, qkvu.shape[1])
    qkvu, theta, initial_state = (None if x is None else x.detach() for x in (qkvu, theta, initial_state))
    if features is None:
        features = gla_features(qkvu, decay, theta, act=act, positions=positions, keys_alone=True)
    return torch.ops.megatron_tn.gla_state(qkvu, features, decay, theta, act, positions, initial_state, cu_seqlens)


@torch.library.custom_op("megatron_tn::lightning_state", mutates_args=())
def _state(k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if not k.is_cuda:
        check_values(decay, cu_seqlens, k.shape[1])
    if plain_backend(k, v) == "triton":
        from kernels.lightning import launch

        return launch.state(k, v, decay, initial_state, cu_seqlens)
    return chunked.forward(k, k, v, decay, initial_state, cu_seqlens)[1].clone()


@torch.library.custom_op("megatron_tn::lightning_state_backward", mutates_args=())
def _state_backward(
    dstate: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    do = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    if plain_backend(k, v) == "triton":
        from kernels.lightning import launch

        out = (None, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)))
        _, dk, dv, dinitial = launch.backward(do, dstate, k, k, v, decay, initial_state, cu_seqlens, out=out)
    else:
        _, dk, dv, dinitial = chunked.backward(do, dstate, k, k, v, decay, initial_state, cu_seqlens)
    return dk, dv, dinitial if initial_state is not None else dinitial.new_empty(0)


@torch.library.custom_op("megatron_tn::gla_state", mutates_args=())
def _gla_state(
    qkvu: Tensor,
    features: Tensor | None,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if not qkvu.is_cuda:
        check_values(decay, cu_seqlens, qkvu.shape[1])
        check_positions(positions, cu_seqlens, qkvu.shape[1])
    _, k, v, _ = parts(qkvu, decay.shape[0])
    if backend(v, theta) == "triton":
        from kernels.lightning import launch

        k = k if features is None else features[:, :, 1]
        return launch.state(k, v, decay, initial_state, cu_seqlens)
    return gla_plain.forward(k, k, v, v, decay, theta, act, False, positions, initial_state, cu_seqlens)[3].clone()


@_state.register_fake
def _state_fake(k, v, decay, initial_state, cu_seqlens):
    return empty_state(k, v, k.shape[-1], cu_seqlens, True)


@_state_backward.register_fake
def _state_backward_fake(dstate, k, v, decay, initial_state, cu_seqlens):
    dinitial = empty_state(k, v, k.shape[-1], cu_seqlens, initial_state is not None)
    return k.new_empty(k.shape), v.new_empty(v.shape), dinitial


@_gla_state.register_fake
def _gla_state_fake(qkvu, features, decay, theta, act, positions, initial_state, cu_seqlens):
    v = parts(qkvu, decay.shape[0])[2]
    return empty_state(v, v, v.shape[-1] * (1 if theta is None else 2), cu_seqlens, True)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dstate):
    k, v, decay, initial_state, cu_seqlens = ctx.saved_tensors
    dk, dv, dinitial = torch.ops.megatron_tn.lightning_state_backward(dstate, k, v, decay, initial_state, cu_seqlens)
    return dk, dv, None, None if initial_state is None else dinitial.to(initial_state.dtype), None


_state.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.megatron_tn.lightning_state)
def _flops(k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B T H K V: k_t^T v_t at every position."""
    batch, total, heads, width = k_shape
    return 2 * batch * total * heads * width * v_shape[-1]


@register_flop_formula(torch.ops.megatron_tn.lightning_state_backward)
def _backward_flops(dstate_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(k_shape, v_shape)


@register_flop_formula(torch.ops.megatron_tn.gla_state)
def _gla_flops(qkvu_shape, features_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs) -> int:
    batch, total, fused = qkvu_shape
    width = fused // 4 // decay_shape[0]
    return 2 * batch * total * decay_shape[0] * width * width * (1 if theta_shape is None else 2)
