"""Feature maps of the queries and keys (arXiv 2307.14995, section 3.1.2 and the ablation of the activation)."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "1+elu": lambda x: 1 + F.elu(x),
}


def activation(x: Tensor, name: str) -> Tensor:
    """Apply the feature map `name` elementwise: "silu", "none" (x itself) or "1+elu".

    x: any shape, any floating type; the result has the same. Raises ValueError for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"name={name!r} is not one of the activations {sorted(ACTIVATIONS)}")
    if not torch.is_floating_point(x):
        raise ValueError(f"x.dtype={x.dtype} is not a floating type")
    return ACTIVATIONS[name](x)
