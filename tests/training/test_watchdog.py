"""The watchdog by tables, without processes; hangs and deaths of real ranks are in tests/end_to_end/test_hang.py."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_tn.training import rewind
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.watchdog import Progress, Watchdog, living_run, signs, watch
from megatron_tn.training.watchdog.detect import Observation, from_collective, patience_s, waited_for
from megatron_tn.training.watchdog.explain import explain_failure, explain_hang
from megatron_tn.training.watchdog.observe import Observer
from megatron_tn.training.watchdog.signs import Sign, file_of, read_all
from megatron_tn.training.watchdog.stack import where_is


def sign(rank: int, **more) -> Sign:
    return Sign(rank, f"host{rank // 8}", 100 + rank, **{"count": 5, "step": 4, "phase": "step", **more})


def observe(*after: Sign, dead: tuple[int, ...] = (), size: int | None = None) -> Observation:
    """All ranks gave a sign between the two looks, but for `dead` ones."""
    before = {one.rank: one if one.rank in dead else replace(one, count=one.count - 1) for one in after}
    return Observation(before, {one.rank: one for one in after}, size or len(after))


# Signs of life


def test_a_sign_is_read_as_it_was_written_and_fits_its_bytes(tmp_path):
    written = sign(3, place="x" * 9000, failed="é" * 9000, waiting=True, lost=True)
    written.write(tmp_path)
    found = Sign.read(file_of(tmp_path, 3))
    assert found == replace(
        written, place=written.place[: len(found.place)], failed=written.failed[: len(found.failed)]
    )
    assert len(found.failed) >= 400
    assert file_of(tmp_path, 3).stat().st_size == signs.BYTES
    replace(found, count=6, failed="").write(tmp_path)  # a shorter one over a longer one
    assert Sign.read(file_of(tmp_path, 3)).count == 6


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"rank": 0, "wat": 1}'])
def test_a_sign_that_cannot_be_read_is_none(tmp_path, content):
    file_of(tmp_path, 0).write_text(content)
    sign(1).write(tmp_path)
    assert list(read_all(tmp_path, 3)) == [1]


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(watch.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(watch.dist, "get_world_size", lambda: 1)


def test_a_sign_of_life_is_given_wherever_the_rank_is(tmp_path, monkeypatch, alone):
    monkeypatch.setattr(watch, "where_this_process_is", lambda: 1 // 0)
    with Watchdog(RunFolder(tmp_path), Progress(), timeout_s=60, long_s=60) as watching:
        found = Sign.read(file_of(watching.folder, 0))
    assert found.count == 1
    assert found.place.startswith("unknown source line: ZeroDivisionError(")


@pytest.mark.parametrize(
    ("state", "changes", "lives"),
    [
        ("running", {"count": 6}, True),
        ("running", {}, False),
        ("finished", {"count": 6}, False),
        ("running", {"count": 6, "host": socket.gethostname(), "pid": 2**22 + 1}, False),  # no such process here
    ],
    ids=["gives another sign", "gives no other", "ended", "its process is gone"],
)
def test_a_run_that_is_under_way_is_known_by_its_signs(tmp_path, monkeypatch, state, changes, lives):
    run = RunFolder(tmp_path)
    run.write_status(state, 3)
    folder = signs.new_folder(run)
    first = replace(sign(0), **{key: value for key, value in changes.items() if key != "count"})
    first.write(folder)
    monkeypatch.setattr(signs.time, "sleep", lambda _: replace(first, **changes).write(folder))
    assert bool(living_run(run)) == lives


def test_a_frame_between_two_lines_stands_at_its_function():
    """As Python 3.11 shows a running thread's now and then."""
    code = sys._getframe().f_code
    waiting, place = where_is(SimpleNamespace(f_code=code, f_lineno=None, f_back=None))
    assert not waiting
    assert place.endswith(f"test_watchdog.py:{code.co_firstlineno} in {code.co_name}: def {code.co_name}():")


# Detection


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        ([sign(0), sign(1, step=3), sign(2)], [1]),
        ([sign(0, phase="data"), sign(1), sign(2, phase="save")], [0]),
        ([sign(0, waiting=True), sign(1), sign(2, waiting=True)], [1]),
        ([sign(0, waiting=True), sign(1, waiting=True)], []),
        ([sign(0), sign(1)], []),
        ([sign(0)], [0]),
    ],
    ids=["an earlier step", "an earlier phase", "does not wait", "all wait", "none waits", "one rank"],
)
def test_whom_the_others_wait_for(ranks, wanted):
    assert [one.rank for one in waited_for(ranks)] == wanted


@pytest.mark.parametrize(
    ("phase", "first_step", "failed", "seconds"),
    [
        ("step", False, False, 10),
        ("data", True, False, 10),
        ("step", True, False, 99),
        ("save", False, False, 99),
        ("save", False, True, 10),
    ],
)
def test_how_long_a_rank_may_stay_in_a_phase(phase, first_step, failed, seconds):
    assert patience_s(phase, first_step=first_step, failed=failed, timeout_s=10, long_s=99) == seconds


def test_a_rewind_may_take_as_long_as_a_start(monkeypatch):
    """It reads a checkpoint, as a start does."""
    progress, phases = Progress(), []
    progress.at("step", 9)

    class Chosen(Exception):
        pass

    def choose(folder):
        phases.append(progress.phase)
        raise Chosen

    monkeypatch.setattr(rewind, "newest_start", choose)
    run = SimpleNamespace(
        progress=progress,
        is_first=True,
        folder=None,
        writer=SimpleNamespace(join=lambda: phases.append(progress.phase)),
    )
    with pytest.raises(Chosen):
        rewind.rewind(run, None, None)
    assert phases == ["start", "start"]


def chained(first: Exception, cause: Exception) -> Exception:
    first.__cause__ = cause
    return first


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (chained(ValueError("no batch"), RuntimeError("Broken pipe")), True),
        (ValueError("a socket is not a batch"), False),
        (RuntimeError("shape [2, 3] is invalid"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered", 710), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
    ],
    ids=["gloo", "nccl", "cause", "own", "shape", "cuda", "memory"],
)
def test_whose_error_it_is(error, others):
    assert from_collective(error) == others


# Explanation


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (
            observe(sign(0), sign(1), dead=(1,)),
            "rank 1 (host host0, process 101) gives no sign of life: it has died or",
        ),
        (observe(sign(0), size=2), "rank 1 gives no sign of life"),
        (
            observe(sign(0, failed="RuntimeError: gloo", lost=True), sign(9, failed="ValueError: wet"), dead=(0, 9)),
            "rank 9 (host host1, process 109) failed: ValueError: wet",
        ),
        (
            observe(sign(0, failed="nccl", lost=True), sign(1, failed="OutOfMemoryError: CUDA out of memory")),
            "rank 1 (host host0, process 101) failed: OutOfMemoryError: CUDA out of memory",
        ),
        (observe(sign(0, failed="gloo", lost=True), sign(1), dead=(0,)), "all ranks are alive, but the connection"),
    ],
    ids=["died", "never gave a sign", "failed", "out of memory", "connection"],
)
def test_a_failure_in_words(seen, words):
    assert explain_failure(seen).startswith(words)


def test_a_hang_in_words():
    ranks = sign(0, waiting=True, place="train.py:9 in f: all_reduce(x)"), sign(1, place="read.py:3 in g: read()")
    times = {"limit_s": 10.0, "timeout_s": 10.0, "stacks": "run/stacks"}
    said = explain_hang(observe(*ranks), **times).splitlines()
    assert said == [
        "hang: no progress for 10 s (hang_timeout_s=10): the others wait for rank 1 (host host0, process 101) (step 4, "
        "step, is at read.py:3 in g: read()); stacks are in run/stacks",
        "  rank 0 (host host0, process 100): step 4, step, waits at train.py:9 in f: all_reduce(x)",
        "  rank 1 (host host0, process 101): step 4, step, is at read.py:3 in g: read()",
    ]
    said = explain_hang(observe(*ranks, dead=(1,)), **times).splitlines()
    assert said[0].endswith("rank 1 (host host0, process 101): no sign of life, it has died or was stopped")
    assert "last seen in step 4" in said[2]
    alike = explain_hang(observe(sign(0, waiting=True), sign(1, waiting=True)), **times)
    assert "all ranks are at the same place" in alike


def test_a_failure_of_512_ranks_is_found_out_once(tmp_path, monkeypatch):
    """Each of those that are left is told which rank died; one of them opens the files of all, twice."""
    size, dead, opened, said = 512, 77, [], []
    monkeypatch.setattr("time.sleep", lambda _: None)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))

    def all_give_a_sign(count: int) -> None:
        for rank in set(range(size)) - {dead}:
            sign(rank, count=count).write(tmp_path)

    all_give_a_sign(1)
    sign(dead, count=1).write(tmp_path)
    for _ in range(size - 1):
        observer = Observer(tmp_path, size, 0.0, lambda: all_give_a_sign(2))
        said.append(observer.failure(lambda text: pytest.fail("rank 0 is alive, and says it itself")))
    assert set(said) == {"rank 77 (host host9, process 177) gives no sign of life: it has died or was stopped"}
    assert len(opened) <= 4 * size


@pytest.mark.parametrize("dead", [0, 1])
def test_where_rank_0_has_died_another_says_so_in_status(tmp_path, monkeypatch, dead):
    monkeypatch.setattr("time.sleep", lambda _: None)
    said = []
    for rank in range(3):
        sign(rank, count=1).write(tmp_path)

    def live() -> None:
        for rank in {0, 1, 2} - {dead}:
            sign(rank, count=2).write(tmp_path)

    for _ in range(2):
        text = Observer(tmp_path, 3, 0.0, live).failure(said.append)
    assert said == ([text] if dead == 0 else [])


def test_where_nothing_can_be_written_each_rank_looks_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    real = os.open

    def full(path, flags, *rest, **more):
        if flags & os.O_EXCL:
            raise OSError(28, "No space left on device")
        return real(path, flags, *rest, **more)

    sign(0).write(tmp_path)
    monkeypatch.setattr(os, "open", full)
    found = [Observer(tmp_path, 2, 0.0, lambda: None).failure(lambda _: None) for _ in range(2)]
    assert found[0] == found[1]
    assert "rank 1 gives no sign of life" in found[0]


def test_a_rank_whose_observer_died_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    (tmp_path / "failure.begun").touch()
    assert "ended before it had finished" in Observer(tmp_path, 2, 0.0, lambda: None).failure(lambda _: None)
