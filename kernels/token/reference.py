"""The definition of `token_linear` and `token_glu`, in the type of the inputs."""

import torch.nn.functional as F
from torch import Tensor


def token_linear(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float | None = None,
    square_sum: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [B, K], weight [N, K] -> [B, N]; the arguments of `kernels.token_linear`."""
    y = (x * _scale(x, eps, square_sum)) @ weight.t()
    return y if residual is None else residual + y


def token_glu(x: Tensor, gate: Tensor, value: Tensor, *, eps: float, act: str = "none") -> Tensor:
    """x [B, K], gate and value [F, K] -> [B, F]."""
    normed = x * _scale(x, eps, None)
    a = normed @ gate.t()
    return (F.silu(a) if act == "silu" else a) * (normed @ value.t())


def _scale(x: Tensor, eps: float | None, square_sum: Tensor | None) -> Tensor | float:
    if eps is None:
        return 1.0
    total = x.square().sum(-1) if square_sum is None else square_sum.sum(-1)
    return (total / x.shape[-1] + eps).rsqrt().unsqueeze(-1)
