"""The final state of gated linear attention, which a context-parallel rank sends before it computes its output."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.gla import plain
from kernels.gla.check import check_gla_values
from kernels.gla.inputs import GlaInputs, key_width, parts, products
from kernels.lightning.op import empty_state


@torch.library.custom_op("megatron_tn::gla_state", mutates_args=())
def gla_state(
    qkvu: Tensor,
    features: Tensor | None,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    positions: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """`gla`'s final state, [B or documents, H, K, d] fp32 (fp64 for fp64), without its output; outside autograd.
    features: from `form_features`; q's are not read. Per head, positions whose decay to the end is 0 are not read."""
    inputs = GlaInputs(qkvu, decay, theta, act, False, positions, initial_state, cu_seqlens)
    if not qkvu.is_cuda:
        check_gla_values(decay, positions, cu_seqlens, inputs.total)
    if inputs.backend == "triton":
        from kernels.lightning import passes

        _, k, v, _ = inputs.parts
        k = k if features is None else features[:, :, 1]
        return passes.final_state(k=k, v=v, decay=decay, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return plain.final_state(inputs)


@gla_state.register_fake
def _fake(qkvu, features, decay, theta, act, positions, initial_state, cu_seqlens):
    v = parts(qkvu, decay.shape[0])[2]
    return empty_state(v, v, key_width(v, theta), cu_seqlens, wanted=True)


@register_flop_formula(torch.ops.megatron_tn.gla_state)
def _flops(qkvu_shape, features_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B T H K d: k_t^T v_t at every position."""
    return 2 * products(qkvu_shape, decay_shape, theta_shape)
