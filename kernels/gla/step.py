"""One decoding step of gated linear attention: state update and output from the fused projection.

Two operators: `gla_step` returns the next state in a new tensor, `gla_step_` writes it over the given one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.gla import plain
from kernels.gla.inputs import PIECE, GlaInputs
from kernels.lightning.check import check_values
from kernels.numerics import accumulation_dtype


@torch.library.custom_op("megatron_tn::gla_step", mutates_args=())
def gla_step(
    qkvu: Tensor,
    state: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gla` for one token, outside autograd: qkvu [B, 1, 4 H d] and state [B, H, K, d] fp32 -> y [B, 1, H d], the sum
    of o^2 [B, 1] and the next state. positions: [1] or [B, 1]."""
    if not qkvu.is_cuda:
        check_values(decay, None, 1)
    inputs = GlaInputs(qkvu, decay, theta, act, gate, positions, state, None)
    if inputs.backend == "triton":
        from kernels.gla import triton_step

        new_state = torch.empty(state.shape, dtype=torch.float32, device=state.device)
        y, parts = triton_step.step(inputs, new_state)
        return y, parts.sum(-1, keepdim=True), new_state
    y, o, _, state = plain.forward(inputs)
    return y.flatten(2).contiguous(), _square_sums(o).sum(-1, keepdim=True), state


@torch.library.custom_op("megatron_tn::gla_step_", mutates_args=("state",))
def gla_step_(
    qkvu: Tensor,
    state: Tensor,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gla_step` that writes the next state over `state`, which is contiguous. Returns y and, instead of the sum of
    o^2, sums over PIECE columns of a head each, [B, P], P = H ceil(d / PIECE)."""
    if not qkvu.is_cuda:
        check_values(decay, None, 1)
    inputs = GlaInputs(qkvu, decay, theta, act, gate, positions, state, None)
    if inputs.backend == "triton":
        from kernels.gla import triton_step

        return triton_step.step(inputs, state)
    y, o, _, new_state = plain.forward(inputs)
    state.copy_(new_state)
    return y.flatten(2).contiguous(), _square_sums(o)


def _square_sums(o: Tensor) -> Tensor:
    """o [B, 1, H, d] -> the sums of o^2 over PIECE columns of a head each, [B, P]."""
    o = o.to(accumulation_dtype(o.dtype)).flatten(0, 1)
    return F.pad(o, (0, -o.shape[-1] % PIECE)).unflatten(-1, (-1, PIECE)).square().sum(-1).flatten(1)


@gla_step.register_fake
def _fake(qkvu, state, decay, theta, act, gate, positions):
    batch, _, fused = qkvu.shape
    wide = accumulation_dtype(qkvu.dtype)
    return (
        qkvu.new_empty(batch, 1, fused // 4),
        qkvu.new_empty(batch, 1, dtype=wide),
        state.new_empty(state.shape, dtype=wide),
    )


@gla_step_.register_fake
def _fake_(qkvu, state, decay, theta, act, gate, positions):
    batch, _, fused = qkvu.shape
    _, heads, _, width = state.shape
    parts = heads * -(-width // PIECE)
    return qkvu.new_empty(batch, 1, fused // 4), qkvu.new_empty(batch, parts, dtype=accumulation_dtype(qkvu.dtype))


@register_flop_formula([torch.ops.megatron_tn.gla_step, torch.ops.megatron_tn.gla_step_])
def _flops(qkvu_shape, state_shape, *args, out_shape=None, **kwargs) -> int:
    """4 B H K d: k^T v and q S."""
    batch, heads, summed, width = state_shape
    return 4 * batch * heads * summed * width
