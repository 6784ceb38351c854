"""Products with weights that are kept in fp8 with a scale a row: y = x W^T, W[n, k] = scale[n] * data[n, k].

Decoding reads every weight once a token, so its time is that of the weights' bytes. x is not quantised, and W is exact
in bf16, so y is that of a bf16 weight W, for every number of rows. No gradients: decoding and evaluation alone use
them. `reference` defines the product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import dispatch
from kernels.float8_linear import reference
from kernels.float8_linear.reference import TYPE, quantize_rows
from kernels.numerics import accumulation_dtype

__all__ = ["MOST_ROWS", "OLDEST_CAPABILITY", "TYPE", "float8_linear", "obstacle", "quantize_rows"]

OLDEST_CAPABILITY = (8, 9)  # Ada: the first GPUs that convert e4m3 numbers
MOST_ROWS = 64  # T of the kernel; with more, a copy of the weight in x's type and cuBLAS's product take less time


def float8_linear(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """x [..., K], data [N, K] in e4m3, contiguous, scale fp32 [N] -> x W^T [..., N] in x's type, with fp32 sums (fp64
    for fp64). Raises ValueError naming the argument that does not fit."""
    if not torch.is_floating_point(x) or data.dim() != 2 or x.shape[-1] != data.shape[1] or data.dtype != TYPE:
        raise ValueError(
            f"data is {list(data.shape)} {data.dtype}; it must be [N, {x.shape[-1]}] of {TYPE}, and x, {x.dtype}, "
            "of a floating type"
        )
    fits = scale.shape == data.shape[:1] and scale.dtype == torch.float32
    if not (fits and scale.is_contiguous() and data.is_contiguous()):
        raise ValueError(
            f"scale is {list(scale.shape)} {scale.dtype}; it must be [{len(data)}] of torch.float32, and data and "
            f"scale, of strides {data.stride()} and {scale.stride()}, must be contiguous"
        )
    y = torch.ops.megatron_tn.float8_linear(x.reshape(-1, data.shape[1]), data, scale)
    return y.view(*x.shape[:-1], len(data))


def obstacle(device: torch.device) -> str | None:
    """Why no kernel can read fp8 weights on this device; None on a CPU, where PyTorch reads them."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if (found := torch.cuda.get_device_capability(device)) >= OLDEST_CAPABILITY:
        return None
    oldest, found = (".".join(map(str, each)) for each in (OLDEST_CAPABILITY, found))
    return f"the GPU's compute capability {found} is older than {oldest} (Ada), the first that converts e4m3"


@torch.library.custom_op("megatron_tn::float8_linear", mutates_args=())
def _linear(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    if _backend(x) == "triton":
        from kernels.float8_linear import triton_float8

        if x.shape[0] <= MOST_ROWS:
            return triton_float8.linear(x.contiguous(), data, scale)
        return F.linear(x, triton_float8.dequantized(data, scale, x.dtype))
    if x.is_cuda:
        return reference.float8_linear(x, data, scale)
    wide = accumulation_dtype(x.dtype)
    return reference.float8_linear(x.to(wide), data, scale).to(x.dtype)


@_linear.register_fake
def _linear_fake(x, data, scale):
    return x.new_empty(x.shape[0], data.shape[0])


@register_flop_formula(torch.ops.megatron_tn.float8_linear)
def _linear_flops(x_shape, data_shape, *args, out_shape=None, **kwargs) -> int:
    """2 T N K."""
    return 2 * x_shape[0] * data_shape[0] * data_shape[1]


def _backend(x: Tensor) -> str:
    return dispatch.choose("fp8 products", x, obstacle(x.device))
