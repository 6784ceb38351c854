"""The Newton-Schulz iteration (Jordan 2024) of a batch of matrices of one shape."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kernels import dispatch
from kernels.newton_schulz.reference import EPS, A, B, C

HALF_TYPES = (torch.bfloat16, torch.float16)
LEAST_ROWS = 512  # 10 of 16 tiles of 128 x 128 are made


@torch.no_grad()
def newton_schulz(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Bring the singular values of each of `matrices` [n, rows, columns] near 1, and keep its singular vectors: the
    result of `reference.newton_schulz` for each. A new tensor of matrices' type, bf16, fp16, fp32 or fp64, in which the
    products are made; Frobenius norms are summed in fp32 at least. Without a gradient.

    FLOPs, see `flops`: with r = min(rows, columns) and c = max(rows, columns), an iteration multiplies the Gram matrix
    [r, r] of the short side. In bf16 and fp16, from r = LEAST_ROWS on, a Triton kernel makes half of the two symmetric
    products.

    Raises:
        ValueError: matrices are not [n, rows, columns].
    """
    if matrices.dim() != 3:
        raise ValueError(f"matrices.shape={tuple(matrices.shape)} must be [n, rows, columns]")
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norms = vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=wide).clamp(min=EPS)
    x = torch.div(matrices, norms, out=torch.empty_like(matrices))  # divides in fp32, stores in matrices' type
    tall = x.shape[1] > x.shape[2]
    for _ in range(iterations):
        factor = gram_polynomial(x.mT if tall else x)
        # (a I + b A + c A^2) X, or X (a I + b A + c A^2) for the Gram matrix A = X^T X
        x = torch.baddbmm(x, x, factor, beta=A) if tall else torch.baddbmm(x, factor, x, beta=A)
    return x


def gram_polynomial(x: Tensor) -> Tensor:
    """b A + c A^2 for A = X X^T of each X of x [n, r, c], of any strides, in x's type: [n, r, r]."""
    if x.dtype in HALF_TYPES and x.shape[1] >= LEAST_ROWS and dispatch.choose("gram_polynomial", x) == "triton":
        from kernels.newton_schulz.triton_symmetric import symmetric_product

        gram = symmetric_product(x)
        return symmetric_product(gram, C, gram, B)  # A^2 = A A^T
    gram = x @ x.mT
    return torch.baddbmm(gram, gram, gram, beta=B, alpha=C)


def flops(rows: int, columns: int, iterations: int = 5, *, symmetric: bool = False) -> int:
    """FLOPs of one matrix; a multiply-add counts as two.

    symmetric: A = X X^T and A^2, which are symmetric, are made by half.
    """
    r, c = sorted((rows, columns))
    grams = 2 * r * r * c + 2 * r**3
    return iterations * (grams // (2 if symmetric else 1) + 2 * r * r * c)
