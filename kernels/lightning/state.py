"""The final state of lightning attention alone, which a rank of a context-parallel group needs before its output."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.lightning import gla_plain
from kernels.lightning.check import check_features, check_gla, check_positions, check_values
from kernels.lightning.fused import backend, document_positions, parts
from kernels.lightning.gla import gla_features
from kernels.lightning.op import empty_state


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


@_gla_state.register_fake
def _gla_state_fake(qkvu, features, decay, theta, act, positions, initial_state, cu_seqlens):
    v = parts(qkvu, decay.shape[0])[2]
    return empty_state(v, v, v.shape[-1] * (1 if theta is None else 2), cu_seqlens, True)


@register_flop_formula(torch.ops.megatron_tn.gla_state)
def _gla_flops(qkvu_shape, features_shape, decay_shape, theta_shape, *args, out_shape=None, **kwargs) -> int:
    batch, total, fused = qkvu_shape
    width = fused // 4 // decay_shape[0]
    return 2 * batch * total * decay_shape[0] * width * width * (1 if theta_shape is None else 2)
