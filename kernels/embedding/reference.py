"""The definition of the scaled embedding, differentiable by autograd, in the weight's type."""

import torch.nn.functional as F
from torch import Tensor


def scaled_embedding(ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    return F.one_hot(ids, weight.shape[0]).to(weight.dtype) @ weight * scale
