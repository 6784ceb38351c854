"""The benchmark measures nothing that is wrong."""

import pytest
import torch

from kernels.bench.__main__ import report
from kernels.bench.cases import Case


def doubling(factor: float) -> Case:
    x = torch.ones(8, 4, requires_grad=True)
    return Case("doubling", lambda x: factor * x, [x], [torch.ones(8, 4)], lambda x: 2 * x)


@pytest.mark.parametrize("factor", [2.001, float("nan")])
def test_a_wrong_operator_is_not_timed(factor, capsys):
    assert not report(doubling(factor), doubling(factor), 1.0, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "fwd" not in printed


def test_a_right_operator_is_timed_against_its_bytes(capsys):
    case = doubling(2.0)
    assert (case.forward_bytes, case.backward_bytes) == (2 * 128, 3 * 128)
    assert report(case, case, 64.0, torch.device("cpu"))
    forward, both = capsys.readouterr().out.splitlines()
    assert f"{256 / 64:.3f}" in forward
    assert f"{640 / 64:.3f}" in both
