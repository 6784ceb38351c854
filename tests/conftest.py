"""What holds for every test: one compute thread a process, imports that no garbage collection looks at, Ctrl-C is
heard, no secret of one test is hidden from the messages of another, and a test marked `gpu` is skipped, with the
reason, where there are too few devices."""

import gc
import os
import signal

import pytest
import torch

from data_pipeline import redaction


def pytest_configure() -> None:
    # Two workers with two threads each on two cores wait for each other's threads most of the time.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
    # A shell has what it starts in the background ignore Ctrl-C, and so would the processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported stays: no later collection looks at it


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = max((mark.args[0] if mark.args else 1 for mark in item.iter_markers("gpu")), default=0)
    if wanted and torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}")


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests():
    yield
    redaction._written.clear()
    redaction._values.clear()
