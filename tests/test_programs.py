"""Command lines as subprocesses side by side: what a failure says and stops, and what a signal does."""

import os
import signal
import threading
import time

import pytest

from launch.results.__main__ import told_to_stop
from launch.results.runs import Failed, Programs, TimeUp, end_of


def test_a_failure_has_the_end_of_its_log_and_stops_what_waits(tmp_path):
    programs, done = Programs(), []
    fails = lambda: programs.run("no_such_module", ["a=1"], tmp_path / "log")  # noqa: E731
    with pytest.raises(
        Failed, match=r"python -m no_such_module a=1: exit code 1; the end of .*log:\n.*No module named"
    ):
        programs.side_by_side([fails, lambda: programs.run("this", [], tmp_path / "x"), lambda: done.append(1)], 1)
    assert not (tmp_path / "x").exists()
    (tmp_path / "log").write_text("Error: why\n" + "".join(f"frame #{n}: _start + 0x25\n" for n in range(33)) + "\n")
    assert end_of(tmp_path / "log") == "Error: why"


def test_a_signal_tells_programs_to_stop(tmp_path, monkeypatch):
    """They get SIGTERM, as a training run does that then saves; no further one starts."""
    (tmp_path / "waits.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(143)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    programs, log = Programs(), tmp_path / "log"

    def send() -> None:
        while not log.exists() or "ready" not in log.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with told_to_stop(programs):
        threading.Thread(target=send).start()
        with pytest.raises(TimeUp):
            programs.run("waits", [], log)
    assert log.read_text() == "ready\nsaved\n"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(TimeUp):
        programs.run("waits", [], log)
