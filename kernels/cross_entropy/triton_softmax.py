"""What stands between the head's products: the softmax's statistics, and its gradient written over the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # columns at a time


@triton.jit
def statistics_kernel(
    logits_pointer,  # [n, V]
    rows_pointer,  # [n] int64: the target's column, -1 where it is another rank's or there is none
    highest_pointer,  # [n] fp32
    sums_pointer,  # [2, n] fp32: sum of exp(logit - highest), and the target's logit
    tokens,
    columns,  # columns that count; those beyond are padding
    row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start = logits_pointer + row.to(tl.int64) * row_stride
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for column in range(0, columns, BLOCK):
        at = column + tl.arange(0, BLOCK)
        logits = tl.load(start + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        now = tl.maximum(highest, logits)
        # Lanes that have seen nothing yet hold -inf, and -inf - -inf is no number.
        total = total * tl.where(highest == now, 1.0, tl.exp(highest - now)) + tl.where(
            logits == float("-inf"), 0.0, tl.exp(logits - now)
        )
        highest = now
    peak = tl.max(highest, 0)
    total = tl.sum(tl.where(highest == float("-inf"), 0.0, total * tl.exp(highest - peak)), 0)
    target = tl.load(rows_pointer + row)
    picked = tl.load(start + tl.maximum(target, 0), mask=target >= 0, other=0.0).to(tl.float32)
    tl.store(highest_pointer + row, peak)
    tl.store(sums_pointer + row, total)
    tl.store(sums_pointer + tokens + row, picked)


@triton.jit
def gradient_kernel(
    logits_pointer,  # [n, V]
    gradient_pointer,  # [n, V] over the same memory, each row at its logits' own start
    rows_pointer,
    kept_pointer,  # [n] bool: whether the token has a loss
    normalizer_pointer,  # [n] fp32: log of the sum of exp(logit)
    columns,
    width,  # V, padding included
    row_stride,
    gradient_stride,
    BLOCK: tl.constexpr,
):
    """softmax - one_hot(target), zero where the token has no loss and in padding. The gradient's elements are no wider
    than the logits', so a block overwrites what it has read itself, or what came before."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(rows_pointer + row)
    kept = tl.load(kept_pointer + row)
    normalizer = tl.load(normalizer_pointer + row)
    for column in range(0, width, BLOCK):
        at = column + tl.arange(0, BLOCK)
        logits = tl.load(logits_pointer + row * row_stride + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logits - normalizer) - tl.where(at == target, 1.0, 0.0)
        gradient = tl.where(kept & (at < columns), gradient, 0.0)
        tl.debug_barrier()  # all threads have read the block before any writes over it
        at_gradient = gradient_pointer + row * gradient_stride + at
        tl.store(at_gradient, gradient.to(gradient_pointer.dtype.element_ty), mask=at < width)
        tl.debug_barrier()


def statistics(logits: Tensor, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """logits [n, V] -> highest [n] and [sum of exp(logit - highest), target's logit] [2, n], fp32."""
    tokens = logits.shape[0]
    highest = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    sums = torch.empty(2, tokens, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        statistics_kernel[(tokens,)](
            logits, rows, highest, sums, tokens, columns, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS
        )
    return highest, sums


def gradient_(logits: Tensor, rows: Tensor, kept: Tensor, normalizer: Tensor, columns: int, dtype: torch.dtype) -> None:
    """Turn logits [n, V] into their gradient, of type `dtype`, in the first bytes of every row's own memory."""
    gradient = logits.view(dtype)
    with torch.cuda.device_of(logits):
        gradient_kernel[(logits.shape[0],)](
            logits,
            gradient,
            rows,
            kept,
            normalizer,
            columns,
            logits.shape[1],
            logits.stride(0),
            gradient.stride(0),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
