"""Work in several threads, and the block of host memory that one of them makes."""

import mmap
import threading

import pytest
import torch

from megatron_tn.device.host_memory import HostMemory
from megatron_tn.device.threads import in_parallel


@pytest.mark.parametrize("threads", [1, 3])
def test_items_are_made_here_at_most_so_many_ahead_and_used_elsewhere(threads):
    made, done, here = [], [], threading.get_ident()

    def items():
        for item in range(50):
            assert threading.get_ident() == here
            assert len(made) - len(done) <= threads + 2
            made.append(item)
            yield item

    def use(item):
        assert threading.get_ident() != here
        done.append(item)

    in_parallel(use, items(), threads)
    assert (done if threads == 1 else sorted(done)) == list(range(50))  # one thread keeps the order


@pytest.mark.parametrize("where", ["use", "items"])
def test_an_error_is_raised_here_when_all_threads_have_ended(where):
    before, made = threading.active_count(), []

    def items():
        for item in range(10_000):
            made.append(item)
            if where == "items" and item == 20:
                raise ValueError(where)
            yield item

    def use(item):
        if where == "use" and item >= 20:
            raise ValueError(where)

    with pytest.raises(ValueError, match=where):
        in_parallel(use, items())
    assert threading.active_count() == before
    assert 20 < len(made) < 10_000


def test_host_memory_is_made_ahead_and_kept(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_DONTFORK", raising=False)  # macOS has no such advice
    memory = HostMemory()
    memory.prepare(100_003, pinned=False)
    block = memory.take(100_003, pinned=False)
    assert (block.dtype, block.shape, block.data_ptr() % mmap.PAGESIZE) == (torch.float32, (100_003,), 0)
    assert not block.any()
    assert memory.take(5, pinned=False).data_ptr() == block.data_ptr()
    memory.prepare(1 << 48, pinned=False)  # a petabyte
    with pytest.raises(OSError, match="memory"):
        memory.take(1 << 48, pinned=False)
    assert memory.take(0, pinned=False).numel() == 0  # the failure was of another call
    assert memory.take(7, pinned=False).numel() == 7
