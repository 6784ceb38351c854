"""The steps of the fused cross-entropy around its products, as registered operators, each with a plain PyTorch form.

A token's softmax is e / Z with e = exp(logit - reference) and Z the sum of e over the vocabulary. dlogits =
e / Z - onehot is never formed. Both gradient products use e - Z onehot instead; the factor 1 / Z is applied to rows of
hidden or dhidden, which have D columns, not V. So each exponential is written once, with the logits' product, and read
twice, by the gradient products.

Names: n tokens of a chunk; V rows of this rank's weight; `columns` of them before the padding; target_rows [n] int64,
the row of each token's target, -1 where another rank holds the row or the token has no loss.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.numerics import accumulation_dtype, product

# Largest logit - reference, in nats: exp(60) = 1e26, and a sum of 1e10 such terms is finite in fp32.
LIMIT = 60.0


@torch.library.custom_op("megatron_tn::head_exponentials", mutates_args=())
def head_exponentials(
    hidden: Tensor, weight: Tensor, target_rows: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """exp(hidden weight^T - reference) [n, V], zero from `columns` on, and four vectors [n] in fp32 (fp64 for fp64):
    reference, target's logit (0 where target_rows is -1), highest logit, sum of exponentials.

    Type of the exponentials: hidden's with Triton, the accumulation type with plain PyTorch.
    """
    if _backend(hidden) == "triton":
        from kernels.cross_entropy import exponentials

        return exponentials.exponentials(hidden=hidden, weight=weight, target_rows=target_rows, columns=columns)
    wide = accumulation_dtype(hidden.dtype)
    logits = product(hidden.to(wide), weight.to(wide).T)
    target_logits = logits.gather(1, target_rows.clamp(min=0)[:, None])[:, 0].masked_fill_(target_rows < 0, 0)
    logits[:, columns:] = float("-inf")
    # All rows of a rank may be padding.
    highest = logits.amax(dim=1) if columns else logits.new_full(target_rows.shape, torch.finfo(wide).min)
    e = logits.sub_(highest[:, None]).exp_()
    return e, highest.clone(), target_logits, highest, e.sum(dim=1)


@head_exponentials.register_fake
def _exponentials_fake(hidden, weight, target_rows, columns):
    n, wide = hidden.shape[0], accumulation_dtype(hidden.dtype)
    stored = hidden.dtype if _backend(hidden) == "triton" else wide
    return hidden.new_empty(n, weight.shape[0], dtype=stored), *(hidden.new_empty(n, dtype=wide) for _ in range(4))


@register_flop_formula(torch.ops.megatron_tn.head_exponentials)
def _flops(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """2 n D V: hidden weight^T."""
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
    """Recompute, in place, the exponentials of tokens with highest > reference + LIMIT, with `highest` as reference.

    Returns the final reference [n], and the sum [n] of exp(logit - highest) over this rank's columns. highest: [n],
    highest logit over all ranks' vocabulary. sums, reference: [n], from `head_exponentials`.
    """
    if _backend(hidden) == "triton":
        from kernels.cross_entropy import exponentials as launches

        return launches.totals_(
            exponentials,
            sums=sums,
            reference=reference,
            hidden=hidden,
            weight=weight,
            highest=highest,
            columns=columns,
            limit=LIMIT,
        )
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
    target_rows: Tensor,
    has_loss: Tensor,
    reference: Tensor,
    normalizer: Tensor,
    target_logits: Tensor,
) -> Tensor:
    """Subtract Z from every target's exponential; write hidden / Z to `scaled` [n, D], contiguous, of the exponentials'
    type; return 1 / Z [n], 0 for tokens without a loss.

    has_loss: [n] bool. normalizer: [n], log of the sum of exp(logit) over the whole vocabulary.
    """
    if _backend(hidden) == "triton":
        from kernels.cross_entropy import triton_gradient

        return triton_gradient.gradient_(
            exponentials,
            scaled=scaled,
            hidden=hidden,
            target_rows=target_rows,
            has_loss=has_loss,
            reference=reference,
            normalizer=normalizer,
            target_logits=target_logits,
        )
    at = target_rows.clamp(min=0)[:, None]
    target = (target_logits - reference).exp_() - (normalizer - reference).exp_()
    exponentials.scatter_(1, at, torch.where(target_rows[:, None] >= 0, target[:, None], exponentials.gather(1, at)))
    scale = (reference - normalizer).exp_().masked_fill_(~has_loss, 0)
    torch.mul(hidden, scale[:, None], out=scaled)
    return scale


@head_gradient_.register_fake
def _gradient_fake(exponentials, scaled, hidden, target_rows, has_loss, reference, normalizer, target_logits):
    return torch.empty_like(reference)


@torch.library.custom_op("megatron_tn::head_scaled", mutates_args=())
def head_scaled(x: Tensor, factor: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [n, D] times factor, a scalar, and times scales [n] row by row where given, in `dtype`; rounded once."""
    if dispatch.choose("linear_cross_entropy", x) == "triton":
        from kernels.cross_entropy import triton_gradient

        return triton_gradient.scaled(x, factor=factor, scales=scales, dtype=dtype)
    factors = factor if scales is None else (scales * factor)[:, None]
    return torch.mul(x, factors, out=torch.empty_like(x, dtype=dtype))


@head_scaled.register_fake
def _scaled_fake(x, factor, scales, dtype):
    return torch.empty_like(x, dtype=dtype)


def add_weight_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, D], of the accumulation type, += dlogits [n, V]^T hidden [n, D]; first: = in place of +=."""
    out = {"out": total} if dlogits.dtype == total.dtype else {"out_dtype": total.dtype, "out": total}
    if first:
        torch.mm(dlogits.T, hidden, **out)
    else:
        # Not total.addmm_(...), which PyTorch's FLOP counter does not count.
        torch.addmm(total, dlogits.T, hidden, **out)


def _backend(hidden: Tensor) -> str:
    unsupported = None
    if hidden.dtype == torch.float16:
        unsupported = "exponentials before normalisation, up to exp(60), exceed the range of fp16"
    elif hidden.is_cuda and hidden.dtype == torch.float32:
        unsupported = "its tiles are for tensor cores, which have no fp32 product of full precision"
    return dispatch.choose("linear_cross_entropy", hidden, unsupported)
