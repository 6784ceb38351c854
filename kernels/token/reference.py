"""The definition of `token_linear` and `token_glu`, in the type of the inputs."""

from torch import Tensor

from kernels.activations.plain import ACTIVATIONS


def token_linear(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float | None = None,
    square_sum: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [K], weight [N, K] -> [N]; the arguments of `kernels.token_linear`."""
    y = weight @ (x * _scale(x, eps, square_sum))
    return y if residual is None else residual + y


def token_glu(x: Tensor, gate: Tensor, value: Tensor, *, eps: float, act: str = "none") -> Tensor:
    """x [K], gate and value [F, K] -> [F]."""
    normed = x * _scale(x, eps, None)
    return ACTIVATIONS[act].function(gate @ normed) * (value @ normed)


def _scale(x: Tensor, eps: float | None, square_sum: Tensor | None) -> Tensor | float:
    if eps is None:
        return 1.0
    total = x.square().sum() if square_sum is None else square_sum.sum()
    return (total / x.shape[0] + eps).rsqrt()
