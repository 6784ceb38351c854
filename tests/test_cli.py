"""How a program that trains ends: with its own exit code, whatever its threads do meanwhile."""

from __future__ import annotations

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
