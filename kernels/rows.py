"""Converts tensors to [rows, D] with a contiguous last dimension, for the elementwise and norm kernels."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with a contiguous last dimension; a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def block_for(width: int) -> tuple[int, int]:
    """(width rounded up to a power of two, number of warps for about 16 elements per thread)."""
    block = max(16, 1 << (width - 1).bit_length())
    return block, min(max(block // 512, 1), 16)
