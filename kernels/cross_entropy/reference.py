"""The definition of the loss, from the logits of all tokens, differentiable by autograd, in the inputs' type."""

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses and each token's loss [T] (0 where ignored).

    hidden: [T, D]. weight: [V, D], V the whole vocabulary with its padding. targets: [T].
    """
    logits = hidden @ weight[:vocab_size].T
    has_loss = targets != ignore_index
    target_logits = logits.gather(1, targets.where(has_loss, 0)[:, None])[:, 0]
    losses = (torch.logsumexp(logits, dim=1) - target_logits).where(has_loss, 0)
    return losses.sum(), losses
