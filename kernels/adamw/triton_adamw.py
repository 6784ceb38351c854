"""AdamW's update in Triton: every tensor is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # elements a program: 8 a thread, two 16-byte accesses of each tensor


@triton.jit
def update_kernel(
    master_pointer,
    gradient_pointer,
    first_pointer,
    second_pointer,
    copy_pointer,
    divisor_pointer,
    elements,
    kept,
    step_size,
    first_left,
    second_left,
    second_correction,
    eps,
    HAS_COPY: tl.constexpr,
    HAS_DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    master = tl.load(master_pointer + at, mask=mask, other=0.0)
    gradient = tl.load(gradient_pointer + at, mask=mask, other=0.0)
    first = tl.load(first_pointer + at, mask=mask, other=0.0)
    second = tl.load(second_pointer + at, mask=mask, other=0.0)
    if HAS_DIVISOR:
        divisor = tl.load(divisor_pointer)
        gradient /= divisor
        elements = tl.where(divisor < float("inf"), elements, 0)  # NaN is not below it
        mask = at < elements
    first += first_left * (gradient - first)
    second += second_left * (gradient * gradient - second)
    master = master * kept - step_size * first / (tl.sqrt(second) * second_correction + eps)
    tl.store(master_pointer + at, master, mask=mask)
    tl.store(first_pointer + at, first, mask=mask)
    tl.store(second_pointer + at, second, mask=mask)
    if HAS_COPY:
        tl.store(copy_pointer + at, master.to(copy_pointer.dtype.element_ty), mask=mask)


def update_(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    divisor: Tensor | None,
    copy: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `kernels.adamw.op.adamw_`."""
    elements = master.numel()
    with torch.cuda.device_of(master):
        update_kernel[(triton.cdiv(elements, BLOCK),)](
            master,
            gradient,
            first,
            second,
            copy,
            divisor,
            elements,
            # What needs more digits than fp32 has is worked out here: 1 - beta ** step at the first steps.
            1 - lr * weight_decay,
            lr / (1 - betas[0] ** step),
            1 - betas[0],
            1 - betas[1],
            (1 - betas[1] ** step) ** -0.5,
            eps,
            HAS_COPY=copy is not None,
            HAS_DIVISOR=divisor is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
