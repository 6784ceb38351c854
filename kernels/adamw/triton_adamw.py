"""AdamW's update in Triton: one kernel, which reads every tensor once and writes it once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # elements per program: 8 per thread, two 16-byte accesses per tensor


@triton.jit
def update_kernel(
    master_pointer,
    gradient_pointer,
    first_pointer,
    second_pointer,
    copy_pointer,
    divisor_pointer,
    elements,
    kept,  # 1 - lr weight_decay
    step_size,  # lr / (1 - beta1^step)
    first_left,  # 1 - beta1
    second_left,  # 1 - beta2
    second_correction,  # (1 - beta2^step)^-1/2
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
        elements = tl.where(divisor < float("inf"), elements, 0)  # for NaN or infinity, masks out all stores
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
    *,
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    divisor: Tensor | None,
    copy: Tensor | None,
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
            master_pointer=master,
            gradient_pointer=gradient,
            first_pointer=first,
            second_pointer=second,
            copy_pointer=copy,
            divisor_pointer=divisor,
            elements=elements,
            # In Python's double precision: 1 - beta ** step at the first steps has few correct digits in fp32.
            kept=1 - lr * weight_decay,
            step_size=lr / (1 - betas[0] ** step),
            first_left=1 - betas[0],
            second_left=1 - betas[1],
            second_correction=(1 - betas[1] ** step) ** -0.5,
            eps=eps,
            HAS_COPY=copy is not None,
            HAS_DIVISOR=divisor is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
