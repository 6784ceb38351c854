"""Programmatic dependent launch: a kernel's programs start while those of the preceding kernel still run.

A kernel with the constant DEPENDENT calls gdc_launch_dependents, which lets the next kernel start, and gdc_wait before
it touches what earlier kernels read or write. Before gdc_wait it may only load tensors that no kernel of a decoding
step writes, such as weights: several kernels can be waiting at once. Needs compute capability 9.
"""

import torch
from torch import Tensor

OLDEST_CAPABILITY = 9


def launch_options(x: Tensor) -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel with the constant DEPENDENT, on x's device."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] < OLDEST_CAPABILITY:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}
