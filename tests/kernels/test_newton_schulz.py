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


@pytest.mark.parametrize(("rows", "columns"), [(12, 7), (7, 12)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rows_or_columns_are_scaled_to_one_norm(rows, columns, dtype, bound):
    given = matrices(rows, columns, dtype)
    given[0, 3] *= 1e-3
    given[0, :, 2] *= 1e-3
    found = given.clone()
    kernels.equalize_norms_(found)
    for one, matrix in zip(found[:2], given, strict=False):
        assert relative_error(one, reference.equalize_norms(matrix.double())) < bound
        norms = one.double().norm(dim=0 if columns > rows else 1)
        assert (norms / norms.mean() - 1).abs().max() < bound
    assert not found[2].any()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"matrices.shape=\(4, 4\) must be \[n, rows, columns\]"):
        kernels.newton_schulz(torch.ones(4, 4))


def test_flops_are_those_of_three_products_an_iteration():
    assert op.flops(4, 6, 5) == 5 * (2 * 4 * 4 * 6 + 2 * 4**3 + 2 * 4 * 4 * 6) == op.flops(6, 4, 5)
    assert op.flops(4, 6, 5, symmetric=True) == 5 * (4 * 4 * 6 + 4**3 + 2 * 4 * 4 * 6)
    assert op.flops(4, 8, 5, symmetric=True) == 2 * 3 * 4 * 4 * 8 + (9 + 5) * 4**3  # joined by three and by two


def use_tile(monkeypatch, tile: tuple[int, ...]) -> None:
    from kernels.newton_schulz import triton_symmetric

    monkeypatch.setattr(triton_symmetric, "TILES", dict.fromkeys((8, 9), triton_symmetric.Tile(*tile)))


@pytest.mark.parametrize(("rows", "columns"), [(40, 72), (33, 32), (16, 16), (72, 17)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("tile", [(16, 16, 16, 1, 1), (16, 32, 16, 1, 1)], ids=str)
def test_symmetric_products_are_those_of_whole_products(triton_device, monkeypatch, rows, columns, transposed, tile):
    from kernels.newton_schulz import triton_symmetric

    use_tile(monkeypatch, tile)
    draw = torch.Generator().manual_seed(0)
    shape = (2, columns, rows) if transposed else (2, rows, columns)
    x = (torch.randn(shape, generator=draw) / columns**0.5).half().to(triton_device)
    x = x.mT if transposed else x
    gram = triton_symmetric.symmetric_product(x, x.mT)
    exact = x.double() @ x.double().mT
    assert relative_error(gram, exact) < 1e-3
    square = torch.arange(rows, device=gram.device) // tile[1]  # on the diagonal, made whole
    assert torch.equal(gram, gram.mT.where(square[:, None] != square, gram))
    polynomial = triton_symmetric.symmetric_product(gram, gram, 2.0, gram, -3.0)
    exact = 2 * gram.double() @ gram.double() - 3 * gram.double()
    assert relative_error(polynomial, exact) < 1e-3
    found = triton_symmetric.symmetric_product(polynomial, gram, 1.0, gram, 3.4)
    assert relative_error(found, polynomial.double() @ gram.double() + 3.4 * gram.double()) < 1e-3


@pytest.mark.parametrize(("rows", "columns"), [(48, 80), (96, 40)], ids=str)  # one by one, and joined
def test_iterations_by_half_are_the_definition(triton_device, monkeypatch, rows, columns):
    monkeypatch.setattr(op, "LEAST_ROWS", 1)
    if triton_device == "cpu":  # a few tiles, and parts of one
        use_tile(monkeypatch, (32, 32, 32, 1, 1))
    given = matrices(rows, columns, torch.float16)[1:].to(triton_device)
    found = kernels.newton_schulz(given)
    assert relative_error(found[0], reference.newton_schulz(given[0].double(), 5)) < 2e-2
    assert not found[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(2048, 2048), (2048, 5632), (5632, 2048)], ids=str)
def test_a_models_matrices_by_half(cuda, rows, columns):
    given = torch.randn(3, rows, columns, device=cuda, dtype=torch.bfloat16)
    found = kernels.newton_schulz(given)
    with kernels.dispatch.backend("torch"):
        plain = kernels.newton_schulz(given)
    exact = kernels.newton_schulz(given.double())
    error, plain_error = relative_error(found, exact), relative_error(plain, exact)
    assert error < 1.1 * plain_error < 0.1
