"""The scaled embedding in Triton: a row is read, multiplied and written in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 4


@triton.jit
def forward_kernel(
    ids_pointer,  # [tokens] int64
    weight_pointer,  # [vocabulary, width]
    y_pointer,  # [tokens, width]
    scale,
    row_start,
    vocabulary,
    weight_row,
    width,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    row = tl.load(ids_pointer + token) - row_start
    here = (row >= 0) & (row < vocabulary)
    x = tl.load(weight_pointer + row * weight_row + column, mask=mask & here, other=0.0).to(tl.float32)
    tl.store(y_pointer + token * width + column, (x * scale).to(y_pointer.dtype.element_ty), mask=mask)


def forward(ids: Tensor, weight: Tensor, scale: float, row_start: int) -> Tensor:
    """ids [...], weight [V, D] -> [..., D], contiguous."""
    vocabulary, width = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    y = torch.empty(*ids.shape, width, dtype=weight.dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        forward_kernel[(ids.numel() * triton.cdiv(width, BLOCK),)](
            ids.contiguous(),
            weight,
            y,
            scale,
            row_start,
            vocabulary,
            weight.stride(0),
            width,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return y
