"""The elementwise parts of Muon's update in Triton: every tensor is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # elements per program: 8 per thread


@triton.jit
def direction_kernel(
    out_pointer,
    momentum_pointer,
    gradient_pointer,
    divisor_pointer,
    elements,
    beta,
    left,  # 1 - beta
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    momentum = tl.load(momentum_pointer + at, mask=mask, other=0.0)
    gradient = tl.load(gradient_pointer + at, mask=mask, other=0.0)
    divisor = tl.load(divisor_pointer)
    gradient = tl.where(divisor < float("inf"), gradient / divisor, momentum)
    momentum += left * (gradient - momentum)
    gradient += beta * (momentum - gradient)
    tl.store(momentum_pointer + at, momentum, mask=mask)
    tl.store(out_pointer + at, gradient.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit
def apply_kernel(
    master_pointer,
    update_pointer,
    copy_pointer,
    divisor_pointer,
    elements,
    kept,  # 1 - lr weight_decay
    step_size,  # lr scale
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # For NaN or infinity, masks out all stores.
    mask = at < tl.where(tl.load(divisor_pointer) < float("inf"), elements, 0)
    master = tl.load(master_pointer + at, mask=mask, other=0.0)
    update = tl.load(update_pointer + at, mask=mask, other=0.0).to(tl.float32)
    master = master * kept - step_size * update
    tl.store(master_pointer + at, master, mask=mask)
    if HAS_COPY:
        tl.store(copy_pointer + at, master.to(copy_pointer.dtype.element_ty), mask=mask)


def direction_(out: Tensor, momentum: Tensor, gradient: Tensor, beta: float, divisor: Tensor) -> None:
    """See `kernels.muon.op.muon_direction_`."""
    elements = momentum.numel()
    with torch.cuda.device_of(momentum):
        direction_kernel[(triton.cdiv(elements, BLOCK),)](
            out, momentum, gradient, divisor, elements, beta, 1 - beta, BLOCK=BLOCK, num_warps=WARPS
        )


def apply_(master: Tensor, update: Tensor, copy: Tensor | None, kept: float, step_size: float, divisor: Tensor) -> None:
    """See `kernels.muon.op.muon_apply_`."""
    elements = master.numel()
    with torch.cuda.device_of(master):
        apply_kernel[(triton.cdiv(elements, BLOCK),)](
            master,
            update,
            copy,
            divisor,
            elements,
            kept,
            step_size,
            HAS_COPY=copy is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
