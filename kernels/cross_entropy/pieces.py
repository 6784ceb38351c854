"""The steps of the fused cross-entropy between its products, registered, each with a plain PyTorch form.

A token's softmax is e / Z with e = exp(logit - reference) and Z its sum. The gradient of the logits, (e / Z - onehot),
is never formed: (e - Z onehot) takes its place in both products, and 1 / Z scales what is small, a row of the hidden
state or of its gradient. So the exponentials are touched once between the product that makes them and the two that use
them.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.numerics import accumulation_dtype, product

# How far a logit may lie above its row's reference, in nats: a sum of 1e10 such exponentials is finite in fp32.
LIMIT = 60.0


@torch.library.custom_op("megatron_tn::head_exponentials", mutates_args=())
def head_exponentials(
    hidden: Tensor, weight: Tensor, rows: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """exp(hidden weight^T - reference) [n, V], zero from `columns` on, and fp32 vectors [n]: the reference, the
    target's logit (0 where rows [n] is -1), the highest logit, and the exponentials' sum.

    The exponentials are of hidden's type from Triton, in the accumulation type otherwise.
    """
    if _backend(hidden) == "triton":
        from kernels.cross_entropy import triton_head

        return triton_head.exponentials(hidden, weight, rows, columns)
    wide = accumulation_dtype(hidden.dtype)
    logits = product(hidden.to(wide), weight.to(wide).T)
    picked = logits.gather(1, rows.clamp(min=0)[:, None])[:, 0].masked_fill_(rows < 0, 0)
    logits[:, columns:] = float("-inf")
    # A rank may hold padding alone.
    highest = logits.amax(dim=1) if columns else logits.new_full(rows.shape, torch.finfo(wide).min)
    exponentials = logits.sub_(highest[:, None]).exp_()
    return exponentials, highest.clone(), picked, highest, exponentials.sum(dim=1)


@head_exponentials.register_fake
def _exponentials_fake(hidden, weight, rows, columns):
    n, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    kept = hidden.dtype if _backend(hidden) == "triton" else wide
    return hidden.new_empty(n, weight.shape[0], dtype=kept), *(hidden.new_empty(n, dtype=wide) for _ in range(4))


@register_flop_formula(torch.ops.megatron_tn.head_exponentials)
def _flops(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0]


@torch.library.custom_op("megatron_tn::head_totals_", mutates_args=("exponentials",))
def head_totals_(
    exponentials: Tensor,
    sums: Tensor,
    reference: Tensor,
    hidden: Tensor,
    weight: Tensor,
    highest: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """The reference [n] that the exponentials have after this, and the sum [n] of exp(logit - highest) over this rank's
    columns. highest [n]: of all ranks. A row whose reference lies more than LIMIT below it is done again from it."""
    if _backend(hidden) == "triton":
        from kernels.cross_entropy import triton_head

        return triton_head.totals_(exponentials, sums, reference, hidden, weight, highest, columns, LIMIT)
    used = torch.where(highest - reference > LIMIT, highest, reference)
    exponentials *= (reference - used).exp_()[:, None]
    return used, sums * (reference - highest).exp_()


@head_totals_.register_fake
def _totals_fake(exponentials, sums, reference, hidden, weight, highest, columns):
    return torch.empty_like(reference), torch.empty_like(reference)


@torch.library.custom_op("megatron_tn::head_gradient_", mutates_args=("exponentials", "scaled"))
def head_gradient_(
    exponentials: Tensor,
    scaled: Tensor,
    hidden: Tensor,
    rows: Tensor,
    kept: Tensor,
    reference: Tensor,
    normalizer: Tensor,
    picked: Tensor,
) -> Tensor:
    """Take Z from every target's exponential; return 1 / Z [n], 0 where kept [n] is False; hidden / Z goes to `scaled`
    [n, D], contiguous, of the exponentials' type.

    normalizer [n]: log of the sum of exp(logit). picked [n]: the targets' logits. rows [n]: their columns, or -1.
    """
    if _backend(hidden) == "triton":
        from kernels.cross_entropy import triton_head

        return triton_head.gradient_(exponentials, scaled, hidden, rows, kept, reference, normalizer, picked)
    at = rows.clamp(min=0)[:, None]
    target = (picked - reference).exp_() - (normalizer - reference).exp_()
    exponentials.scatter_(1, at, torch.where(rows[:, None] >= 0, target[:, None], exponentials.gather(1, at)))
    scale = (reference - normalizer).exp_().masked_fill_(~kept, 0)
    torch.mul(hidden, scale[:, None], out=scaled)
    return scale


@head_gradient_.register_fake
def _gradient_fake(exponentials, scaled, hidden, rows, kept, reference, normalizer, picked):
    return torch.empty_like(reference)


@torch.library.custom_op("megatron_tn::head_scaled", mutates_args=())
def head_scaled(x: Tensor, factor: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [n, D] times factor, a scalar, and times scales [n] row by row, in `dtype`; rounded once."""
    unsupported = "fp64 is for references" if x.dtype == torch.float64 else None
    if dispatch.choose("linear_cross_entropy", x, unsupported) == "triton":
        from kernels.cross_entropy import triton_head

        return triton_head.scaled(x, factor, scales, dtype)
    factors = factor if scales is None else (scales * factor)[:, None]
    return torch.mul(x, factors, out=torch.empty_like(x, dtype=dtype))


@head_scaled.register_fake
def _scaled_fake(x, factor, scales, dtype):
    return torch.empty_like(x, dtype=dtype)


def add_weight_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, D], in the accumulation type, += dlogits [n, V]^T hidden [n, D]; or = for the first."""
    out = {"out": total} if dlogits.dtype == total.dtype else {"out_dtype": total.dtype, "out": total}
    if first:
        torch.mm(dlogits.T, hidden, **out)
    else:
        # Not total.addmm_(...), which PyTorch's FLOP counter does not know.
        torch.addmm(total, dlogits.T, hidden, **out)


def _backend(hidden: Tensor) -> str:
    unsupported = None
    if hidden.dtype == torch.float64:
        unsupported = "fp64 is for references"
    elif hidden.dtype == torch.float16:
        unsupported = "fp16 has not the range of exponentials that are not normalised yet"
    elif hidden.is_cuda and hidden.dtype == torch.float32:
        unsupported = "its tiles are for tensor cores, which have no fp32 product of full precision"
    return dispatch.choose("linear_cross_entropy", hidden, unsupported)
