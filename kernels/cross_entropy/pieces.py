"""The two products of the fused cross-entropy that must come out wider than their operands."""

import torch
from torch import Tensor

from kernels.numerics import accumulation_dtype


def form_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, D] weight [V, D]^T -> [n, V] in the accumulation type, unrounded: bf16 logits would be off by 0.03."""
    wide = accumulation_dtype(hidden.dtype)
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight.T, out_dtype=wide)
    return torch.mm(hidden.to(wide), weight.to(wide).T)


def add_weight_gradient(total: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, D], in the accumulation type, += dlogits [n, V]^T hidden [n, D]; or = for the first."""
    wide = hidden.is_cuda and hidden.dtype != total.dtype
    if not wide:
        dlogits, hidden = dlogits.to(total.dtype), hidden.to(total.dtype)
    out = {"out_dtype": total.dtype, "out": total} if wide else {"out": total}
    if first:
        torch.mm(dlogits.T, hidden, **out)
    else:
        # Not total.addmm_(...), which PyTorch's FLOP counter does not know.
        torch.addmm(total, dlogits.T, hidden, **out)
