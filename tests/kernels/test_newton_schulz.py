"""Newton-Schulz iterations of a batch against the definition, matrix by matrix."""

import pytest
import torch

import kernels
from kernels.newton_schulz import op, reference
from tests.kernels.support import relative_error

SHAPES = [(1, 1), (5, 5), (7, 12), (12, 7), (1, 9), (33, 64)]


def matrices(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[3, rows, columns] of very different norms, the last of them zero."""
    draw = torch.Generator().manual_seed(rows)
    found = torch.randn(3, rows, columns, generator=draw, dtype=torch.float64)
    return (found * torch.tensor([1e3, 1e-3, 0])[:, None, None]).to(dtype)


@pytest.mark.parametrize(("rows", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_batch_is_the_definition_of_each_matrix(rows, columns, dtype, bound):
    given = matrices(rows, columns, dtype)
    before = given.clone()
    found = kernels.newton_schulz(given)
    assert torch.equal(given, before)
    assert found.dtype == dtype
    for one, matrix in zip(found[:2], given, strict=False):
        assert relative_error(one, reference.newton_schulz(matrix.double(), 5)) < bound
    assert not found[2].any()


def test_singular_values_come_near_1_and_vectors_stay():
    u, _, v = torch.linalg.svd(torch.randn(40, 30, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, 30, dtype=torch.float64)
    found = u.T @ kernels.newton_schulz((u * values @ v)[None])[0] @ v.T
    assert (found - found.diagonal().diag()).abs().max() < 1e-12
    assert found.diagonal().min() > 0.68
    assert found.diagonal().max() < 1.21


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"matrices.shape=\(4, 4\) must be \[n, rows, columns\]"):
        kernels.newton_schulz(torch.ones(4, 4))


def test_flops_are_those_of_three_products_an_iteration():
    assert op.flops(4, 6, 5) == 5 * (2 * 4 * 4 * 6 + 2 * 4**3 + 2 * 4 * 4 * 6) == op.flops(6, 4, 5)
    assert op.flops(4, 6, 5, symmetric=True) == 5 * (4 * 4 * 6 + 4**3 + 2 * 4 * 4 * 6)
