"""Memory that another process maps."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tn.device.shared_memory import Address, SharedMemory, mapped
from tests.helpers.ranks import run_shared


def read(address: Address) -> tuple[int, list[float]]:
    block = mapped(address)
    return os.getpid(), torch.from_numpy(block).view(torch.float32)[:3].tolist()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no anonymous files")
def test_another_process_reads_it_and_no_other_memory():
    memory = SharedMemory(100_003)
    assert (memory.block.shape, memory.block.data_ptr() % 4096) == ((100_003,), 0)
    assert not memory.block.any()
    memory.block[:3] = torch.tensor([1.0, 2.0, 3.0])
    ((process, values),) = run_shared(1, read, memory.address)
    assert process != os.getpid()
    assert values == [1.0, 2.0, 3.0]
    address, kept = memory.address, mapped(memory.address)
    assert mapped(address._replace(target="/memfd:of-another-machine (deleted)")) is None
    del memory
    assert mapped(address) is None
    assert kept[:12].view(np.float32).tolist() == values


def test_too_much_memory_is_refused():
    with pytest.raises(OSError, match="memory"):
        SharedMemory(1 << 48)
