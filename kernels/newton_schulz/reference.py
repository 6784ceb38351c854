"""The Newton-Schulz iteration that Muon applies to a matrix (Jordan 2024, kellerjordan.github.io/posts/muon):

    X = G / max(|G|_F, eps)                    so that every singular value is at most 1
    A = X X^T; X = a X + (b A + c A^2) X       `iterations` times

An iteration maps each singular value s to a s + b s^3 + c s^5 and keeps the singular vectors. The coefficients are not
those of a limit at 1: they maximise the slope at 0, so that five iterations bring singular values from 0.003 to 1 into
0.68 to 1.21, and smaller ones to 485 times their size at most.
"""

from torch import Tensor
from torch.linalg import vector_norm

A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7  # least Frobenius norm to divide by: a zero matrix stays zero


def equalize_norms(matrix: Tensor) -> Tensor:
    """matrix [rows, columns] -> the same directions of rows, or of columns where they are more, all of one norm, and
    the same Frobenius norm. (NorMuon, arXiv 2510.05491, algorithm 1, with beta2 = 0 takes rows for every shape.)"""
    vectors = matrix / vector_norm(matrix, dim=1 if len(matrix) >= len(matrix.T) else 0, keepdim=True)
    return vectors * vector_norm(matrix) / vector_norm(vectors)


def gram_polynomial(x: Tensor) -> Tensor:
    """b A + c A^2 for A = X X^T, X [rows, columns]."""
    gram = x @ x.mT
    return B * gram + C * gram @ gram


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """matrix [rows, columns] -> X after `iterations`, in matrix's type."""
    x = matrix / vector_norm(matrix).clamp(min=EPS)
    for _ in range(iterations):
        x = A * x + gram_polynomial(x) @ x
    return x
