"""The definition of the elementwise parts of Muon's update (Jordan 2024; arXiv 2502.16982, equations 1 to 4)."""

from torch import Tensor


def direction(momentum: Tensor, gradient: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """(new momentum M, direction): M = beta M + (1 - beta) G, and Nesterov's (1 - beta) G + beta M."""
    momentum = beta * momentum + (1 - beta) * gradient
    return momentum, (1 - beta) * gradient + beta * momentum


def apply(master: Tensor, update: Tensor, *, lr: float, scale: float, weight_decay: float) -> Tensor:
    """master - lr (scale update + weight_decay master)."""
    return master - lr * (scale * update + weight_decay * master)
