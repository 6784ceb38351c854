"""How a program that trains ends: with its own exit code, whatever threads, children and signals do meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A thread inside PyTorch when the interpreter is torn down aborts the process; this one always is.
PROGRAM = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import torch
from megatron_tn.cli import run_program

matrix = torch.ones(300, 300)

def multiply():
    while True:
        torch.mm(matrix, matrix)

def late():
    time.sleep(0.3)
    print("executor", flush=True)

def main():
    threading.Thread(target=multiply, daemon=True).start()
    ThreadPoolExecutor().submit(late)
    main.file = open(sys.argv[1], "w")
    main.file.write("buffered")
    atexit.register(print, "atexit")
    print("main")
    time.sleep(0.1)
    {end}

{run}
"""


def run(tmp_path: Path, end: str, run: str = "run_program(main)") -> subprocess.CompletedProcess:
    program = PROGRAM.format(end=end, run=run)
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("return", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('no such thing')", 1, "no such thing\n"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_a_program_ends_with_its_own_code_and_leaves_nothing_unwritten(tmp_path, end, code, said):
    ended = run(tmp_path, f"main.file = None; {end}")
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.endswith(said)
    assert "terminate called" not in ended.stderr
    assert ended.stdout.splitlines() == ["main", "executor", "atexit"]
    assert (tmp_path / "file").read_text() == "buffered"


def test_without_it_the_same_program_is_aborted(tmp_path):
    assert run(tmp_path, "return", run="main()").returncode < 0


LEFT_BEHIND = """
import multiprocessing, os, signal, time
from megatron_tn.cli import run_program

def main():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True)
    child.start()
    os.kill(child.pid, signal.SIGSTOP)  # as one that waits for storage, it does not take SIGTERM
    print(child.pid)

run_program(main)
"""


def test_a_reader_that_does_not_answer_is_not_waited_for():
    ended = subprocess.run([sys.executable, "-c", LEFT_BEHIND], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(ended.stdout), 0)


def test_told_to_stop_when_it_is_done_it_still_ends_well(tmp_path):
    end = "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    program = "import os, signal\n" + PROGRAM.format(end=end, run="run_program(main)")
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], cwd=ROOT, timeout=120)
    assert ended.returncode == 0


def test_output_into_a_closed_pipe_ends_quietly():
    program = """
import sys
from megatron_tn.cli import command
from megatron_tn.config import ConvertConfig

sys.argv = ["program"]
command(ConvertConfig, "convert")(lambda config: print("x" * 100_000))()
"""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert ended.stderr == ""
