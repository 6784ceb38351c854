"""One decoding step whose state is read every token, but written only every W tokens (arXiv 2605.19049).

The features of the last keys, and their values, wait in a buffer of W slots. With S the state before slot 0, r the
head's rate and s the slot of the current token,

    o = exp(-r (s + 1)) q S + sum over slots j <= s of exp(-r (s - j)) (q . k_j) v_j

and the step at slot W - 1 folds the buffer into S:

    S <- exp(-r W) S + sum over j of exp(-r (W - 1 - j)) k_j^T v_j

so a token moves (1 + 1/W) states instead of 2. All rows share the slot. A row whose sequence entered the batch between
two folds has `start` b > 0: its S is the state before slot b. There s + 1 and W become s + 1 - b and W - b, and j >= b.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.gla import plain
from kernels.gla.inputs import GlaInputs
from kernels.gla.step_buffer import StepBuffer, ages, fold
from kernels.lightning.check import check_values
from kernels.numerics import accumulation_dtype


@torch.library.custom_op("megatron_tn::gla_step_buffered_", mutates_args=("state", "keys", "values"))
def gla_step_buffered_(
    qkvu: Tensor,
    state: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    start: Tensor,
    fold: bool,
    decay: Tensor,
    theta: Tensor | None,
    act: str,
    gate: bool,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gla_step` with a `StepBuffer`, which it updates: y [B, 1, H d] and the sum of o^2 [B, 1].

    state, keys, values, slot, start, fold: the fields of the buffer.
    """
    if not qkvu.is_cuda:
        check_values(decay, None, 1)
        if fold != (int(slot) == keys.shape[2] - 1):
            raise ValueError(
                f"fold={fold} with slot={int(slot)}: a buffer of W={keys.shape[2]} slots folds at the last"
            )
    buffer = StepBuffer(state, keys, values, slot, start, fold)
    inputs = GlaInputs(qkvu, decay, theta, act, gate, positions, state, None)
    if inputs.backend == "triton":
        from kernels.gla import triton_buffered

        return triton_buffered.step(inputs, buffer)
    return _plain(inputs, buffer)


@gla_step_buffered_.register_fake
def _fake(qkvu, state, keys, values, slot, start, fold, decay, theta, act, gate, positions):
    batch, _, fused = qkvu.shape
    return qkvu.new_empty(batch, 1, fused // 4), qkvu.new_empty(batch, 1, dtype=accumulation_dtype(qkvu.dtype))


@register_flop_formula(torch.ops.megatron_tn.gla_step_buffered_)
def _flops(qkvu_shape, state_shape, keys_shape, *args, out_shape=None, **kwargs) -> int:
    """2 B H (K d + W (K + d)): q S, and W scores with their values; a fold of 2 B H W K d is spread over W steps."""
    batch, heads, summed, width = state_shape
    return 2 * batch * heads * (2 * summed * width + keys_shape[2] * (summed + width))


def _plain(inputs: GlaInputs, buffer: StepBuffer) -> tuple[Tensor, Tensor]:
    q, k, v, u = (x[:, 0] for x in inputs.parts)  # [B, H, d]
    wide = accumulation_dtype(v.dtype)
    q, k = (plain.features(inputs, x[:, None])[:, 0] for x in (q, k))  # [B, H, K]
    batch, heads, slots, _ = buffer.keys.shape
    slot = buffer.slot
    at = slot.view(1, 1, 1, 1)
    buffer.keys.scatter_(2, at.expand_as(k[:, :, None]), k[:, :, None].to(buffer.keys.dtype))
    buffer.values.scatter_(2, at.expand(batch, heads, 1, v.shape[-1]), v[:, :, None].to(buffer.values.dtype))
    age, before = ages(slot, buffer.start, slots, inputs.decay.to(wide))
    scores = torch.einsum("bhk,bhjk->bhj", q, buffer.keys.to(wide)) * age
    o = torch.einsum("bhk,bhkd->bhd", q, buffer.state.to(wide)) * before[..., None]
    o = (o + torch.einsum("bhj,bhjd->bhd", scores, buffer.values.to(wide))).to(v.dtype)
    if buffer.fold:
        buffer.state.copy_(fold(buffer, slot, inputs.decay))
    square_sum = o.flatten(1).to(wide).square().sum(-1, keepdim=True)
    y = o * u if inputs.gate else o
    return y.flatten(1)[:, None].contiguous(), square_sum
