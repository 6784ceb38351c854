"""Memory that another process maps."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tn.device.host_memory import HostMemory
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


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no anonymous files")
def test_a_larger_block_takes_the_place_of_one_that_forked_processes_keep():
    memory, mebibyte = HostMemory(), 1 << 18
    memory.take(mebibyte, pinned=False).fill_(1)
    forked = os.open(memory.address.link, os.O_RDWR)  # a data worker has the file open, too
    assert os.fstat(forked).st_blocks * 512 >= 1 << 20
    assert memory.take(2 * mebibyte, pinned=False).sum() == 0
    assert os.fstat(forked).st_blocks == 0
    os.close(forked)
    memory.release()
    assert memory.address is None


def forbidden(name: str) -> int:
    raise PermissionError


@pytest.mark.parametrize("anonymous_files", ["forbidden", "none"])
def test_memory_is_this_process_s_own_where_there_are_no_anonymous_files(monkeypatch, anonymous_files):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    if anonymous_files == "forbidden":
        monkeypatch.setattr(os, "memfd_create", forbidden, raising=False)
    memory = HostMemory()
    block = memory.take(1000, pinned=False).fill_(1)
    assert memory.address is None
    memory.release()
    assert block.sum() == 1000


def test_too_much_memory_is_refused():
    with pytest.raises(OSError, match="memory"):
        SharedMemory(1 << 48)
