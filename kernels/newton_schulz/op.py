"""The Newton-Schulz iteration (Jordan 2024) of a batch of matrices of one shape."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kernels import dispatch
from kernels.newton_schulz.reference import EPS, A, B, C

HALF_TYPES = (torch.bfloat16, torch.float16)
LEAST_ROWS = 512  # 10 of 16 tiles of 128 x 128 are made, or 6 of 8 of 128 x 256 (triton_symmetric.TILES)
WIDE = 2  # columns / rows from which on iterations are joined
JOINED = 3  # iterations; a fourth would amplify the rounding of the Gram matrix's smallest eigenvalues by 12 once more


@torch.no_grad()
def newton_schulz(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Bring the singular values of each of `matrices` [n, rows, columns] near 1, and keep its singular vectors: the
    result of `reference.newton_schulz` for each. A new tensor of matrices' type, bf16, fp16, fp32 or fp64. Products are
    made in that type, but in fp16 for bf16: |X| <= 1.3 and |Q| <= 41 (see `_joined`) need fp16's digits, not bf16's
    range. Frobenius norms are summed in fp32 at least: a matrix whose norm is above 1.8e19 there gives zeros. Without a
    gradient.

    FLOPs, see `flops`: with r = min(rows, columns) and c = max(rows, columns), an iteration multiplies the Gram matrix
    [r, r] of the short side. In bf16 and fp16, from r = LEAST_ROWS on, a Triton kernel makes half of each symmetric
    product; and from c = WIDE r on, up to JOINED iterations multiply [r, c] only once.

    Raises:
        ValueError: matrices are not [n, rows, columns].
    """
    if matrices.dim() != 3:
        raise ValueError(f"matrices.shape={tuple(matrices.shape)} must be [n, rows, columns]")
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norms = vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=wide).clamp(min=EPS)
    working = torch.float16 if matrices.dtype in HALF_TYPES else matrices.dtype
    # Divides in fp32, stores in the working type.
    x = torch.div(matrices, norms, out=torch.empty_like(matrices, dtype=working))
    for joined in parts(*x.shape[1:], iterations) if working == torch.float16 else [1] * iterations:
        x = _iterated(x, joined)
    return x.to(matrices.dtype)


@torch.no_grad()
def equalize_norms_(matrices: Tensor) -> None:
    """Scale the rows of each of `matrices` [n, rows, columns] to one norm, or the columns where they are more, and keep
    the matrix's: v / |v| * |X|_F / sqrt(max(rows, columns)) for each such vector v of X. A v of zeros stays. Norms are
    summed in fp32 at least."""
    along = 2 if matrices.shape[1] >= matrices.shape[2] else 1
    norms = vector_norm(matrices, dim=along, keepdim=True, dtype=torch.promote_types(matrices.dtype, torch.float32))
    matrices.mul_(norms.square().mean(dim=3 - along, keepdim=True).sqrt() / norms.clamp(min=EPS))


def parts(rows: int, columns: int, iterations: int) -> Iterator[int]:
    """Sizes of the groups of iterations that are made as one product with X each, such as 3 and 2; or 1, 1, ..."""
    most = JOINED if max(rows, columns) >= WIDE * min(rows, columns) else 1
    while iterations > 0:
        yield min(most, iterations)
        iterations -= most


def _iterated(x: Tensor, iterations: int) -> Tensor:
    """X after `iterations` iterations, as one product with X."""
    tall = x.shape[1] > x.shape[2]
    short = x.mT if tall else x
    factor, share = (gram_polynomial(short), A) if iterations == 1 else (_joined(short, iterations), 0.0)
    # (share I + factor) X, or X (share I + factor) for the Gram matrix X^T X
    return torch.baddbmm(x, x, factor, beta=share) if tall else torch.baddbmm(x, factor, x, beta=share)


def gram_polynomial(x: Tensor) -> Tensor:
    """b A + c A^2 for A = X X^T of each X of x [n, r, c], of any strides, in x's type: [n, r, r]."""
    gram = _product(x, x.mT)
    return _product(gram, gram, C, gram, B)


def _joined(x: Tensor, iterations: int) -> Tensor:
    """Q [n, r, r] with Q X the result of `iterations` >= 2 iterations of X, for each X of x [n, r, c], of any strides.

    With A = X X^T and P = b A + c A^2, the next iteration's Gram matrix is (a I + P) A (a I + P). All these matrices
    are polynomials of the first A: they are symmetric, and so are their products.
    """
    gram = _product(x, x.mT)
    q = None
    for left in range(iterations - 1, -1, -1):
        polynomial = _product(gram, gram, C, gram, B)
        if q is None:
            q = polynomial.clone()
            q.diagonal(dim1=1, dim2=2).add_(A)
        else:
            q = _product(polynomial, q, 1.0, q, A)
        if left:
            gram = _product(polynomial, gram, 1.0, gram, A)
            gram = _product(polynomial, gram, 1.0, gram, A)
    return q


def _product(x: Tensor, y: Tensor, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """alpha X Y + beta added, [n, r, r], for a product that is symmetric: Y = X^T, or both are polynomials of one
    symmetric matrix."""
    if x.dtype in HALF_TYPES and x.shape[1] >= LEAST_ROWS and dispatch.choose("gram_polynomial", x) == "triton":
        from kernels.newton_schulz.triton_symmetric import symmetric_product

        return symmetric_product(x, y, alpha, added, beta)
    return x @ y if added is None else torch.baddbmm(added, x, y, beta=beta, alpha=alpha)


def flops(rows: int, columns: int, iterations: int = 5, *, symmetric: bool = False) -> int:
    """FLOPs of one matrix, iteration by iteration; a multiply-add counts as two.

    symmetric: as `newton_schulz` makes it of bf16: symmetric products by half, and iterations joined.
    """
    r, c = sorted((rows, columns))
    if not symmetric:
        return iterations * (4 * r * r * c + 2 * r**3)
    # n joined iterations: A = X X^T, Q X, and [r, r] products: n of A^2, 2 (n - 1) of the next A, n - 1 of the next Q.
    return sum(3 * r * r * c + (4 * n - 3) * r**3 for n in parts(r, c, iterations))
