"""SimpleRMSNorm in Triton: one program a row, which it reads once and keeps in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(x_pointer, y_pointer, x_row, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    x = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(y_pointer + row * width + column, (x * scale).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(dy_pointer, x_pointer, dx_pointer, dy_row, x_row, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < width
    dy = tl.load(dy_pointer + row * dy_row + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    along = tl.sum(dy * x, axis=0) * scale * scale / width
    dx = (dy - x * along) * scale
    tl.store(dx_pointer + row * width + column, dx.to(dx_pointer.dtype.element_ty), mask=mask)


def forward(x: Tensor, eps: float) -> Tensor:
    """x: [..., D] -> contiguous, in x's type."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = _rows(x)
    block, warps = block_for(x.shape[-1])
    with torch.cuda.device_of(x):
        forward_kernel[(rows.shape[0],)](rows, y, rows.stride(0), x.shape[-1], eps, WIDTH=block, num_warps=warps)
    return y


def backward(dy: Tensor, x: Tensor, eps: float) -> Tensor:
    """dy, x: [..., D] -> dx, contiguous, in x's type."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy_rows, rows = _rows(dy), _rows(x)
    block, warps = block_for(x.shape[-1])
    with torch.cuda.device_of(x):
        backward_kernel[(rows.shape[0],)](
            dy_rows, rows, dx, dy_rows.stride(0), rows.stride(0), x.shape[-1], eps, WIDTH=block, num_warps=warps
        )
    return dx


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with a contiguous last dimension; a view wherever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def block_for(width: int) -> tuple[int, int]:
    """The padded width and the number of warps: about 16 elements a thread, 8 warps at most for narrow rows."""
    block = max(16, triton.next_power_of_2(width))
    return block, min(max(block // 512, 1), 16)
