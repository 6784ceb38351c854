"""What holds for every test: one marked `gpu` is skipped, with the reason, where there are too few; Ctrl-C is heard."""

from __future__ import annotations

import signal

import pytest
import torch


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore Ctrl-C, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = max((mark.args[0] if mark.args else 1 for mark in item.iter_markers("gpu")), default=0)
    if wanted and torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}")
