"""How a program that trains ends: with its own exit code, whatever threads, children and signals do meanwhile."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_tn.cli import command, of_words, run_program
from megatron_tn.config import ConvertConfig
from megatron_tn.generate import main as generate
from tests.helpers.training import call, fork_ranks

ROOT = Path(__file__).parents[1]


def multiply() -> None:
    matrix = torch.ones(300, 300)
    while True:
        torch.mm(matrix, matrix)


def busy(folder: str, end: Callable[[], None]) -> None:
    """A program with a thread inside PyTorch, an executor that is not done, an exit handler and an open file."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), number)

    def late() -> None:
        time.sleep(0.3)
        print("executor", flush=True)

    def main() -> None:
        threading.Thread(target=multiply, daemon=True).start()
        ThreadPoolExecutor().submit(late)
        main.file = open(f"{folder}/file", "w")  # noqa: SIM115
        main.file.write("buffered")
        atexit.register(print, "atexit")
        print("main")
        time.sleep(0.1)
        main.file = None
        end()

    run_program(main)


def returns() -> None: ...


def exits_75() -> None:
    sys.exit(75)


def exits_with_words() -> None:
    sys.exit("no such thing")


def fails() -> None:
    raise ValueError("wrong")


def is_interrupted() -> None:
    raise KeyboardInterrupt


def is_told_to_stop_when_it_is_done() -> None:
    atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (returns, 0, ""),
        (exits_75, 75, ""),
        (exits_with_words, 1, "no such thing\n"),
        (fails, 1, "ValueError: wrong\n"),
        (is_interrupted, 130, "interrupted before there was anything to save\n"),
        (is_told_to_stop_when_it_is_done, 0, ""),
    ],
)
def test_a_program_ends_with_its_own_code_and_leaves_nothing_unwritten(tmp_path, end, code, said):
    (process,) = fork_ranks(1, busy, str(tmp_path), end)
    process.join(60)
    errors = (tmp_path / "err").read_text()
    assert process.exitcode == code, errors
    assert errors.endswith(said)
    assert "terminate called" not in errors
    assert (tmp_path / "out").read_text().splitlines() == ["main", "executor", "atexit"]
    assert (tmp_path / "file").read_text() == "buffered"


# A thread inside PyTorch when the interpreter is torn down aborts the process; this one always is.
ABORTED = """
import threading, torch
from tests.test_cli import multiply
threading.Thread(target=multiply, daemon=True).start()
"""


def test_without_it_such_a_program_is_aborted():
    assert subprocess.run([sys.executable, "-c", ABORTED], cwd=ROOT, capture_output=True, timeout=120).returncode < 0


def leave_a_reader_behind(pid: multiprocessing.Value) -> None:
    def main() -> None:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
        child.start()
        os.kill(child.pid, signal.SIGSTOP)  # as one that waits for storage, it does not take SIGTERM
        pid.value = child.pid

    run_program(main)


def test_a_reader_that_does_not_answer_is_not_waited_for():
    pid = multiprocessing.get_context("forkserver").Value("i")
    (process,) = fork_ranks(1, leave_a_reader_behind, pid)
    process.join(60)
    assert process.exitcode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid.value, 0)


def many_lines() -> None:
    print("x" * 100_000)


def print_much(folder: str, words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(os.open(f"{folder}/err", os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = ["program", *words]
    of_settings = command(ConvertConfig, "convert")(lambda config: many_lines())
    run_program(of_words(lambda words: many_lines()) if words == ["folder"] else of_settings)


@pytest.mark.parametrize("words", [[], ["--help"], ["folder"]], ids=["output", "help", "of words"])
def test_output_into_a_closed_pipe_ends_quietly(tmp_path, words):
    (process,) = fork_ranks(1, print_much, str(tmp_path), words)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGPIPE
    assert (tmp_path / "err").read_text() == ""


def test_help_says_what_a_command_does_and_lists_its_own_settings(capsys):
    assert call(generate, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("Continue a text with a trained model.")
    assert "  temperature=0.8\n      the logits are divided by it; 0: always the likeliest token\n" in said
    assert "optim.lr" not in said
    assert "--multirun" not in said  # it has no run_dir
