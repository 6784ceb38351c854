"""What norms of rows have in common, and tensors as [rows, D] with a contiguous last dimension."""

import torch
from torch import Tensor

from kernels import dispatch

MAX_TRITON_WIDTH = 65536  # a row is kept in registers


def check_rows(x: Tensor, eps: float, residual: Tensor | None = None) -> None:
    """ValueError for a scalar, an integer type, eps < 0, and a residual that is not like x."""
    if x.dim() == 0 or not torch.is_floating_point(x):
        raise ValueError(f"x.shape={tuple(x.shape)}, x.dtype={x.dtype} must be [..., D] of a floating type")
    if not eps >= 0:  # also refuses NaN
        raise ValueError(f"eps={eps} must be >= 0")
    if residual is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} and residual is {tuple(residual.shape)} {residual.dtype}; "
            "they must be alike in shape and type"
        )


def backend_of_rows(operator: str, x: Tensor) -> str:
    """`dispatch.choose`, of an operator whose kernel takes rows of at most MAX_TRITON_WIDTH."""
    too_wide = f"the width {x.shape[-1]} exceeds {MAX_TRITON_WIDTH}" if x.shape[-1] > MAX_TRITON_WIDTH else None
    return dispatch.choose(operator, x, too_wide)


def as_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with a contiguous last dimension; a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def block_for(width: int) -> tuple[int, int]:
    """(width rounded up to a power of two, number of warps for about 16 elements per thread)."""
    block = max(16, 1 << (width - 1).bit_length())
    return block, min(max(block // 512, 1), 16)
