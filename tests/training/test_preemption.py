"""Signals to a trainer, and a console that goes away."""

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_tn.training.hooks.console import ConsoleProgress
from megatron_tn.training.preemption import Preemption
from megatron_tn.training.state import TrainingState
from megatron_tn.training.throughput import Work
from tests.helpers.steps import REPORT
from tests.helpers.training import fork_ranks


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_that_comes_again_on_the_way_out_does_nothing(number, code):
    before = {one: signal.getsignal(one) for one in Preemption.SIGNALS}
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # by default this ends a process
        assert (preemption.received, preemption.exit_code) == (signal.Signals(number).name, code)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def wait_until_told(said: str, where: str) -> None:
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    if where == "ignored":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Preemption(joined=where != "joining") as preemption:
        print("ready", file=sys.stderr)
        if where in ("in C", "joining"):  # where Python runs no handler; a signal ends sem_wait, so it is called again
            libc, semaphore = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.sem_init(semaphore, 0, 0)
            while libc.sem_wait(semaphore):
                pass
        time.sleep(0.5)
    print(preemption.received, file=sys.stderr)


@pytest.fixture
def start(tmp_path):
    """A process that waits, once it is ready, and what it says."""

    def start(where: str) -> tuple[multiprocessing.Process, Path]:
        (process,) = fork_ranks(1, wait_until_told, str(tmp_path / "said"), where)
        said = tmp_path / "said"
        while not (said.exists() and said.read_text()):
            time.sleep(0.01)
        return process, said

    return start


def test_a_second_ctrl_c_ends_a_process_that_waits_inside_a_collective(start):
    process, said = start("in C")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)  # torchrun passes on what the terminal sent already: the same Ctrl-C
    process.join(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert (process.exitcode, said.read_text()) == (130, "ready\ninterrupted again: ended without saving\n")


def test_ctrl_c_ends_a_rank_at_once_that_waits_for_the_others_to_join(start):
    process, said = start("joining")
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert (process.exitcode, said.read_text()) == (130, "ready\ninterrupted before there was anything to save\n")


def test_a_process_that_was_started_to_ignore_ctrl_c_ignores_it(start):
    process, said = start("ignored")
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert (process.exitcode, said.read_text()) == (0, "ready\nNone\n")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), SystemExit(1)], ids=["print", "rich"])
def test_progress_that_nobody_reads_any_more_stops_nothing(monkeypatch, caplog, error):
    class Closed(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    hook, state = ConsoleProgress(3, Work(1, 1, None)), TrainingState()
    hook.on_start(state)
    for _ in range(3):
        state.count(REPORT, samples=1)
        hook.on_step(state, REPORT)
    hook.on_stop(state)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["progress cannot be printed"]


@pytest.mark.parametrize(
    ("number", "stopped", "called"),
    [(signal.SIGUSR1, True, True), (signal.SIGUSR1, False, False), (signal.SIGTERM, True, False)],
    ids=["stopped", "reached its end", "cancelled"],
)
def test_a_handler_that_was_there_is_called_after_the_run_has_stopped(number, stopped, called):
    """submitit's: it requeues the job."""
    before = {one: signal.getsignal(one) for one in Preemption.SIGNALS}
    seen: list[int] = []
    try:
        signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
        with Preemption() as preemption:
            os.kill(os.getpid(), number)
            preemption.stopped = stopped
            assert seen == []
        assert seen == [signal.SIGUSR1] * called
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
