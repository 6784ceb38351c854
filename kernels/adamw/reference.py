"""The definition of AdamW's update (arXiv 1711.05101, algorithm 2)."""

from torch import Tensor


def adamw(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """master and the moments first and second after update number `step`, counted from 1, in the inputs' types."""
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient.square()
    mean, square = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
    return master - lr * weight_decay * master - lr * mean / (square.sqrt() + eps), first, second
