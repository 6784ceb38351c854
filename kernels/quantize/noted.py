"""Largest elements that a kernel noted while it wrote a tensor, for the operator that quantises the tensor later.

The search for the largest element reads a tensor once more. A kernel that has the elements in registers anyway notes it
for a few atomic operations, but autograd hands on the tensor alone, possibly as a view. So the note is kept with the
tensor's storage; it holds for a view of all elements, until a write in place.
"""

import torch
from torch import Tensor

SLOTS = 1024  # integers that programs share: few meet in one


def slots(x: Tensor, wanted: bool = True) -> Tensor:
    """Zeros, int32 [SLOTS], on x's device, for the kernel that writes x; empty unless wanted.

    An operator makes and returns them: TorchInductor cannot lower one that writes to an optional argument
    (findings/torch_inductor_cannot_lower_optional_mutated_argument.sh).
    """
    return torch.zeros(SLOTS if wanted else 0, dtype=torch.int32, device=x.device)


def note(x: Tensor, bits: Tensor) -> Tensor:
    """x, of which `bits`, int32 [n], are the `kernels.quantize.op.largest`; empty: not noted."""
    if bits.numel():
        x.untyped_storage().noted = bits, x._version, x.numel()
    return x


def noted(x: Tensor) -> Tensor | None:
    """The bits noted of x, or of the tensor that x is a view of all elements of; None without a note that holds."""
    bits, version, count = getattr(x.untyped_storage(), "noted", (None, 0, 0))
    return bits if (x._version, x.numel()) == (version, count) else None
