"""The benchmark measures nothing that is wrong."""

import dataclasses
import json

import pytest
import torch

from kernels.bench import __main__ as bench
from kernels.bench.cases import Case
from kernels.bench.report import BOTH, FORWARD, Report, Time


def doubling(factor: float) -> Case:
    x = torch.ones(8, 4, requires_grad=True)
    return Case("doubling", "8 x 4", lambda x: factor * x, [x], [torch.ones(8, 4)], lambda x: 2 * x)


@pytest.mark.parametrize("factor", [2.001, float("nan")])
def test_a_wrong_operator_is_not_timed(factor, capsys):
    report = Report(1.0, torch.device("cpu"))
    report.add(doubling(factor), doubling(factor))
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert (report.times, report.wrong) == ([], 1)


class NoGradient(torch.autograd.Function):
    """Twice x, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return dy * float("nan")


def test_an_operator_whose_gradient_is_nan_is_not_timed(capsys):
    case = dataclasses.replace(doubling(2.0), function=NoGradient.apply)
    report = Report(1.0, torch.device("cpu"))
    report.add(case, case)
    assert "WRONG" in capsys.readouterr().out
    assert (report.times, report.wrong) == ([], 1)


def test_a_right_operator_is_timed_against_its_bytes(capsys):
    case = doubling(2.0)
    assert (case.forward_bytes, case.backward_bytes) == (2 * 128, 3 * 128)
    report = Report(64.0, torch.device("cpu"))
    report.add(case, case)
    assert [time.passes for time in report.times] == [FORWARD, BOTH]
    assert [time.floor_ms for time in report.times] == [256 / 64, 640 / 64]
    assert 0 < report.times[0].copies_ms < report.times[1].copies_ms
    title, _, forward, both = capsys.readouterr().out.strip().splitlines()
    assert title == "doubling"
    assert "4.000" in forward
    assert "10.000" in both


def test_rows_and_picture_are_written(tmp_path):
    report = Report(2e6, torch.device("cpu"))
    for length in (1024, 2048):
        for by in ("", "a peer"):
            shape = f"B 2 N {length} H 4 d 8"
            report.times.append(Time("lightning_attention", shape, by, BOTH, 1.5, 0.5, None, None, None, length))
    for _ in range(2):  # a second run replaces the rows of the first
        report.write(tmp_path / "out", "a machine")
    copy, ours, theirs, *_ = rows = [
        json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 5
    origin = {"commit", "dirty", "command", "date", "gpu", "torch", "triton", "python"}
    assert all(origin <= row.keys() and row["torch"] == torch.__version__ for row in rows)
    assert (copy["name"], copy["unit"], copy["value"]) == ("device copy", "GB/s", 2.0)
    assert (ours["name"], ours["unit"], ours["value"]) == ("lightning_attention, forward + backward", "ms", 1.5)
    assert (ours["shape"], ours["floor_ms"], theirs["by"]) == ("B 2 N 1024 H 4 d 8", 0.5, "a peer")
    assert not {"by", "error", "copies_ms"} & ours.keys()
    assert (tmp_path / "out/attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_rows_of_the_operators_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--only", "sglu,branch,rope,add_rms", "--output", str(tmp_path)])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e6)
    assert bench.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["name"].partition(",")[0] for row in rows} == {
        *("device copy", "branch_simple_rms_norm", "add_rms_norm", "sglu", "rope")
    }


def test_tuning_orders_tiles_and_puts_the_pinned_one_back(monkeypatch):
    """With a clock that prefers wide slices, and refuses long chunks as a compiler would."""
    from kernels.bench import tune
    from kernels.lightning.tiles import TILES

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
