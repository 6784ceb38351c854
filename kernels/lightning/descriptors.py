"""TMA descriptors of [B, T, H, width] tensors: on Hopper, the scan loads and stores tiles by bulk tensor copies."""

import functools

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def describable(x: Tensor) -> bool:
    """Whether TMA bulk copies can read and write x [B, T, H, width]: 16-byte aligned rows that do not overlap."""
    return x.data_ptr() % 16 == 0 and _describable_layout(x.shape, x.stride(), x.element_size())


# Building descriptors takes the host as long as a launch, so everything that depends only on shapes is cached.
@functools.lru_cache(maxsize=4096)
def _describable_layout(shape: torch.Size, strides: tuple[int, ...], element_bytes: int) -> bool:
    step = 16 // element_bytes
    aligned = all(s > 0 and s % step == 0 for s, n in zip(strides[:3], shape[:3], strict=True) if n > 1)
    # Bulk copies move multiples of 16 bytes: another width would reach into the next head.
    return aligned and strides[3] == 1 and shape[3] % step == 0


_templates: dict[tuple, dict] = {}  # (shape, strides, type, block) -> fields of a descriptor except its tensor


def descriptor(x: Tensor, positions: int, columns: int) -> TensorDescriptor:
    """x [B, T, H, width] in tiles [1, positions, 1, columns]. x must be `describable`."""
    key = (x.shape, x.stride(), x.dtype, positions, columns)
    fields = _templates.get(key)
    if fields is None:
        if len(_templates) >= 4096:
            _templates.clear()
        # A dimension of size 1 may have any stride, but TensorDescriptor requires a multiple of 16 bytes.
        strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
        made = TensorDescriptor(x, list(x.shape), [*strides, 1], [1, positions, 1, columns])
        _templates[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    made = object.__new__(TensorDescriptor)  # without __post_init__, which would check the same fields again
    vars(made).update(fields, base=x)
    return made
