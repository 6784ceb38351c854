"""What a rank opens and reads before its first step does not depend on the number of ranks; rank 0 reads for all."""

import dataclasses
import errno
import gc
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import InputError
from megatron_tn import imports, preflight, train
from megatron_tn.benchmarking.start_up import Opens, simulate
from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.checkpoint.shares import needed, scattered
from megatron_tn.config import ConfigError, DataConfig, TrainConfig
from megatron_tn.parallel.world import of_first
from megatron_tn.training import run
from tests.helpers.models import tiny_config
from tests.helpers.ranks import run_shared
from tests.helpers.training import fork_ranks


@pytest.mark.parametrize("first", [False, True], ids=["a resume", "init_from, with Muon"])
def test_a_start_of_a_rank_does_not_grow_with_the_world(tmp_path, first):
    opens, found = Opens(), {}
    for ranks in (16, 512):
        found[ranks] = simulate(tmp_path, ranks, opens, first=first)
    for few, many in zip(*found.values(), strict=True):
        assert (many.shared, many.software, many.groups) == (few.shared, few.software, few.groups), (few, many)
    for _, *others in found.values():
        for each in others:
            assert each.manifests == 2  # its end, to see that it is rank 0's; and the lock against its removal
            assert each.read < 1e6
            assert each.told < 1e5
            assert each.groups <= 4


def test_one_job_of_a_sweep_is_deterministic_and_the_next_is_not(monkeypatch):
    def join(_timeout_s: float):
        joined.append(torch.are_deterministic_algorithms_enabled())
        raise RuntimeError("no world")

    joined: list[bool] = []
    monkeypatch.setattr(run, "join_world", join)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for deterministic in (True, False):
        with pytest.raises(RuntimeError, match="no world"):
            run.Run(tiny_config(deterministic=deterministic), None, open_weights=lambda _: None).__enter__()
    assert joined == [True, False]


def test_a_rank_is_sent_the_pieces_that_overlap_its_own():
    def rows(*edges: int) -> list[Piece]:
        return [Piece(((0, 8), (0, 4)), 4 * edges[at], 4 * edges[at + 1], f"{at}") for at in range(len(edges) - 1)]

    stored = {"param/a": rows(0, 2, 4, 6, 8), "exp_avg/a": rows(0, 8), "param/b": [Piece(((0, 4),), 0, 4, "0")]}
    columns = [Piece(((0, 8), (side, side + 2)), 0, 8) for side in (0, 2)]  # rows 0 to 4 of half of the columns
    found = needed(stored, [{"a": rows(0, 3)}, {"a": rows(0, 6, 8)[1:], "b": stored["param/b"]}, {"a": columns}, {}])
    assert [[piece.file for piece in share.get("param/a", [])] for share in found] == [
        ["0", "1"],
        ["3"],
        ["0", "1"],
        [],
    ]
    assert [sorted(share) for share in found] == [
        ["exp_avg/a", "param/a"],
        ["exp_avg/a", "param/a", "param/b"],
        ["exp_avg/a", "param/a"],
        [],
    ]


def test_what_is_wrong_on_one_host_alone_is_told_by_its_ranks(monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(preflight, "problems_before_start", lambda *_, **__: ["no GPU"])
    # Problems of the evaluation, the stream, problems of data and settings, the choice of the start.
    of_rank_0 = iter([[], None, ([], []), None])
    assert preflight.inspect(TrainConfig(), 2, once=lambda read: next(of_rank_0)) == (None, None, ["no GPU"])
    assert "rank 1 (host " in caplog.text
    of_rank_0 = iter([[], None, ([], ["lr"]), None])
    caplog.clear()
    assert preflight.inspect(TrainConfig(), 2, once=lambda read: next(of_rank_0)) == (None, None, ["lr"])
    assert not caplog.text  # rank 0 tells it
    url = dataclasses.replace(TrainConfig(), data=DataConfig(manifest="https://localhost:1/manifest.json"))
    monkeypatch.setattr(preflight, "open_stream", lambda _: _raise(InputError("manifest: no route")))
    of_rank_0 = iter([[], ([], []), None])
    found = preflight.inspect(url, 2, once=lambda read: next(of_rank_0))
    assert found == (None, None, ["data.manifest: no route", "no GPU"])
    assert "data.manifest: no route" in caplog.text


class Unreadable(Exception):
    """Pickle can write but not read it: it would call the constructor with the message alone."""

    def __init__(self, *, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


def ask_of_first() -> None:
    rank = os.environ["RANK"]
    assert of_first(lambda: f"read by {rank}", 60) == "read by 0"
    own = of_first(lambda: lambda: rank, 60)  # a function cannot be pickled
    assert own() == rank
    for error in (ConfigError(["a", "b"]), InputError("a", "b"), Unreadable(problems=["a", "b"])):
        try:
            of_first(lambda error=error: _raise(error), 60)
        except type(error) as caught:
            assert list(caught.problems) == ["a", "b"]  # noqa: PT017
        else:
            raise AssertionError(error)


def _raise(error: Exception) -> None:
    raise error


def scatter_what_cannot_be_read() -> str:
    with pytest.raises(OSError, match="stale") as caught:
        scattered(lambda: _raise(OSError(errno.ESTALE, "stale", "manifest.json")), dist.get_rank(), 2)
    return caught.value.filename


def test_what_rank_0_cannot_read_ends_every_rank_with_its_reason():
    assert run_shared(2, scatter_what_cannot_be_read) == ["manifest.json"] * 2


@pytest.mark.parametrize("ranks", [3])
def test_what_rank_0_reads_or_raises_is_every_rank_s(ranks):
    for process in fork_ranks(ranks, ask_of_first):
        process.join(timeout=100)
        assert process.exitcode == 0


def test_garbage_is_collected_but_while_a_program_imports(capfd):
    """Not in a notebook that imports megatron_tn.train: what is garbage there already would be kept for ever. SIGUSR2
    prints stacks from then on."""
    before = gc.get_freeze_count()
    imports.done()
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)
    imports.begin()
    assert not gc.isenabled()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert "most recent call first" in capfd.readouterr().err
    imports.done()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    lines = Path(train.__file__).read_text().splitlines()
    begin = lines.index("    imports.begin()  # before the imports below")
    assert lines[begin - 2 : begin] == ['if __name__ == "__main__":', "    hold_signals()"]
    assert begin < lines.index("import torch") < lines.index("imports.done()")
