"""A rank that stops, dies, sleeps or fails: the others name it and end, with stacks, in the set time."""

import ctypes
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from megatron_tn.training.run_folder import RunFolder
from tests.helpers.training import SMALL, fork_ranks, records, train_here

TIMEOUT = 2
WORDS = (*SMALL, "engine=local", "schedule.steps=100000", "checkpoint.every=0", f"hang_timeout_s={TIMEOUT}")


def train_until(overrides: tuple[str, ...], said: str, fault: str) -> None:
    """Train; at step 4 rank 1 has a fault. What a process says goes to `said`.RANK."""
    import megatron_tn.train as module

    if fault == "its report takes long":
        real_mark = RunFolder.mark_failed
        RunFolder.mark_failed = lambda *arguments: (time.sleep(0.75 * TIMEOUT), real_mark(*arguments))
    rank = os.environ["RANK"]
    descriptor = os.open(f"{said}.{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    real = module.train_step
    taken = 0

    def step(*arguments, **options):
        nonlocal taken
        taken += 1
        if rank == "1" and taken == 4:
            if fault == "sleeps":
                time.sleep(1000)
            if fault == "holds Python's lock":
                ctypes.PyDLL(None).sleep(1000)
            if fault == "fails":
                raise ValueError("the dog ate it")
        return real(*arguments, **options)

    module.train_step = step
    if fault == "reads for ever":
        generate = module.batches_from

        def batches_from(*arguments):
            for number, batch in enumerate(generate(*arguments)):
                if rank == "1" and number == 3:
                    arguments[-1].at("data", 4)
                    time.sleep(1000)
                yield batch

        module.batches_from = batches_from
    train_here(overrides)


class Ranks:
    """Ranks of a run that was told to do something at step 4."""

    def __init__(self, folder: Path, words: tuple[str, ...], fault: str, size: int = 2):
        self.run = folder / "run"
        self.said = folder / "said"
        self.processes = fork_ranks(size, train_until, (*words, f"run_dir={self.run}"), str(self.said), fault)

    def wait_for_steps(self, steps: int) -> None:
        until = time.monotonic() + 60
        while not (self.run / "log.jsonl").is_file() or len(records(self.run, "loss")) < steps:
            assert time.monotonic() < until, self.words_of(0)
            time.sleep(0.01)

    def wait(self, rank: int, seconds: float = 60) -> int:
        self.processes[rank].join(seconds)
        assert self.processes[rank].exitcode is not None, self.words_of(rank)
        return self.processes[rank].exitcode

    def words_of(self, rank: int) -> str:
        return Path(f"{self.said}.{rank}").read_text()

    def status(self) -> dict:
        return RunFolder(self.run).status()


@pytest.fixture
def start(shards, tmp_path):
    started: list[Ranks] = []

    def start_ranks(fault: str, size: int = 2, *more: str) -> Ranks:
        started.append(Ranks(tmp_path, (*WORDS, f"data.manifest={shards}", *more), fault, size))
        return started[0]

    yield start_ranks
    for process in started[0].processes:
        if process.is_alive():
            process.kill()
            process.join()


def test_a_rank_that_sleeps_is_named_with_its_line(start):
    ranks = start("sleeps")
    ranks.wait_for_steps(3)
    began = time.monotonic()
    assert [ranks.wait(rank) for rank in (0, 1)] == [75, 75]
    assert time.monotonic() - began < 3 * TIMEOUT
    said = ranks.words_of(0) + ranks.words_of(1)
    assert said.count("the others wait for rank 1 (host ") == 1
    assert "time.sleep(1000)" in said
    assert "time.sleep" not in (ranks.run / "stacks" / "rank_00000.txt").read_text()
    assert "all_reduce" in (ranks.run / "stacks" / "rank_00000.txt").read_text()
    assert "in step" in (ranks.run / "stacks" / "rank_00001.txt").read_text()
    assert (ranks.status()["state"], ranks.status()["step"]) == ("failed", 3)
    assert "the others wait for rank 1" in ranks.status()["error"]
    assert "the others wait for rank 1" in (ranks.run / "hang.txt").read_text()


def test_a_rank_that_reads_data_for_ever_is_named(start):
    ranks = start("reads for ever")
    assert [ranks.wait(rank) for rank in (0, 1)] == [75, 75]
    said = ranks.words_of(0) + ranks.words_of(1)
    assert "the others wait for rank 1 (host " in said
    assert "step 4, data, is at" in said


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_rank_that_was_stopped_is_named(start, victim):
    ranks = start("its report takes long")  # as on a busy disk
    ranks.wait_for_steps(2)
    process = ranks.processes[victim].pid
    os.kill(process, signal.SIGSTOP)
    assert ranks.wait(1 - victim) == 75
    said = ranks.words_of(1 - victim)
    assert f"hang: no progress for {TIMEOUT} s (hang_timeout_s={TIMEOUT}): rank {victim} (host " in said
    assert "no sign of life" in said
    assert ranks.status()["state"] == "failed"
    os.kill(process, signal.SIGCONT)  # woken up, it ends as well
    assert ranks.wait(victim) in (1, 75)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_rank_that_dies_is_named_at_once(start, victim):
    ranks = start("")
    ranks.wait_for_steps(2)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    assert ranks.wait(1 - victim, 30) == 1
    said = ranks.words_of(1 - victim)
    assert f"rank {1 - victim} stops: rank {victim} (host " in said
    assert "gives no sign of life: it has died or was stopped" in said
    assert ranks.status()["state"] == "failed"


def test_of_several_that_are_left_none_is_taken_for_the_one_that_died(start):
    """Their collectives break one after the other, and each meets the others' broken connections."""
    # A rank whose neighbours live hears of it when they leave, half of this later and what their leaving takes.
    ranks = start("", 4, "hang_timeout_s=8")
    ranks.wait_for_steps(2)
    os.kill(ranks.processes[2].pid, signal.SIGKILL)
    left = (0, 1, 3)
    assert [ranks.wait(rank, 60) for rank in left] == [1, 1, 1]
    (said,) = (words for rank in left if (words := ranks.words_of(rank)))  # one line, from one rank
    assert " stops: rank 2 (host " in said
    assert "gives no sign of life: it has died or was stopped" in said
    assert said.count("\n") == 1
    assert "Traceback" in (ranks.run / "tracebacks" / "rank_00003.txt").read_text()
    assert ranks.status()["error"].startswith("rank 2 (host ")


def test_a_rank_that_fails_is_named_with_its_error(start):
    ranks = start("fails")
    assert [ranks.wait(rank) for rank in (0, 1)] == [1, 1]
    path = ranks.run / "tracebacks" / "rank_00001.txt"
    said = ranks.words_of(0) + ranks.words_of(1)
    assert said.startswith("rank 1 stops: ValueError: the dog ate it (host ")
    assert said.endswith(f"); traceback: {path}\n")
    assert said.count("\n") == 1
    assert 'raise ValueError("the dog ate it")' in path.read_text()
    assert "failed: ValueError: the dog ate it" in ranks.status()["error"]


def test_code_that_holds_pythons_lock_ends_too(start):
    ranks = start("holds Python's lock")
    assert ranks.wait(1) == 1
    assert "in step" in ranks.words_of(1)  # the stack, from a thread that needs no lock
    # Rank 1 is ended as rank 0 gives up, or just before, which rank 0 then meets as a broken connection.
    assert ranks.wait(0) in (1, 75)
    assert "rank 1 (host " in ranks.words_of(0)
    assert "no sign of life" in ranks.words_of(0)


def test_ranks_that_never_came_are_an_error_that_says_where(shards, tmp_path):
    words = (*WORDS, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", "distributed_timeout_s=3")
    (rank,) = fork_ranks(1, train_alone, words, str(tmp_path / "said"))
    rank.join(60)
    assert rank.exitcode == 1
    said = (tmp_path / "said.0").read_text()
    assert "rank 0 of 2 could not join the others at 127.0.0.1:" in said
    assert "within distributed_timeout_s=3" in said


def test_a_last_save_that_fails_is_one_line(shards, tmp_path):
    words = (*WORDS[:-3], f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", "engine=local", "schedule.steps=3")
    (rank,) = fork_ranks(1, train_without_a_disk, words, str(tmp_path / "said"))
    rank.join(60)
    said = (tmp_path / "said.0").read_text()
    assert rank.exitcode == 1, said
    assert said.startswith("rank 0 stops: CheckpointError: checkpoint ")
    assert "No space left on device" in said
    assert said.count("\n") == 1


def train_without_a_disk(overrides: tuple[str, ...], said: str) -> None:
    """No file of a checkpoint, and no traceback, can be written."""
    from megatron_tn.checkpoint import save
    from megatron_tn.training.run_folder import RunFolder

    def full(*arguments):
        raise OSError(28, "No space left on device")

    save.write_tensors = full
    RunFolder.write_traceback = lambda *arguments: None
    train_until(overrides, said, "")


def test_a_port_in_use_is_one_line(shards, tmp_path):
    words = (*WORDS, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (rank,) = fork_ranks(1, train_on_port, words, str(tmp_path / "said"), port)
        rank.join(60)
    said = (tmp_path / "said.0").read_text()
    assert rank.exitcode == 2, said
    lines = [line for line in said.splitlines() if not line.startswith("[W")]  # torch's own warnings
    assert lines == [
        f"error: MASTER_PORT={port} is in use on this host: name a free port, or start with "
        "launch/local.sh, which finds one"
    ]


def train_on_port(overrides: tuple[str, ...], said: str, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    train_until(overrides, said, "")


def train_alone(overrides: tuple[str, ...], said: str) -> None:
    os.environ["WORLD_SIZE"] = "2"
    train_until(overrides, said, "")
