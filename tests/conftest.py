"""What holds for every test: one marked `gpu` is skipped, with the reason, where there are too few."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = max((mark.args[0] if mark.args else 1 for mark in item.iter_markers("gpu")), default=0)
    if wanted and torch.cuda.device_count() < wanted:
        pytest.skip(f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}")
