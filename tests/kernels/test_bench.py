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


def test_tuning_orders_tiles_and_puts_the_pinned_one_back(monkeypatch):
    """With a clock that prefers wide slices, and refuses long chunks as a compiler would."""
    from kernels.bench import tune
    from kernels.lightning.configs import TILES

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tune.torch, "randn", lambda *shape, dtype, device: torch.zeros(1, dtype=dtype))
    before = dict(TILES[9][2])

    def clock(function, device):
        tile = TILES[9][2][64]
        if tile.chunk == 128:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 / tile.out

    results = tune.tune(64, torch.device("cpu"), time=clock)
    assert [time for time, _ in results] == sorted(time for time, _ in results)
    assert results[0][1].out == 128
    assert {tile.chunk for _, tile in results} == {32, 64}
    assert before[64] in [tile for _, tile in results]
    assert TILES[9][2] == before
