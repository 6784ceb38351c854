"""The definition of the loss, with the whole logits, differentiable by autograd, in the inputs' type."""

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """weight: the whole padded vocabulary. Returns the sum of the losses and each token's (0 where ignored)."""
    logits = hidden @ weight[:vocab_size].T
    kept = targets != ignore_index
    picked = logits.gather(1, targets.where(kept, 0)[:, None])[:, 0]
    losses = (torch.logsumexp(logits, dim=1) - picked).where(kept, 0)
    return losses.sum(), losses
