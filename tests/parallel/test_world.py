"""Joining the world, more than once in a process as the jobs of a sweep do, and leaving it."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tn.config import ConfigError
from megatron_tn.loading import memory_is_named
from megatron_tn.parallel import world
from megatron_tn.parallel.world import join_world, leave_world, release_on_leaving
from tests.helpers.training import fork_ranks

ROOT = Path(__file__).parents[2]
SEGMENTS = """
import torch
from megatron_tn.parallel.world import join_world, leave_world

device = join_world(60)
held = torch.ones(1 << 24, device=device)
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
leave_world()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("said", ["", "expandable_segments:False"], ids=["nothing said", "refused"])
def test_segments_grow_unless_the_environment_says_no(said):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": said} if said else {}
    done = subprocess.run(
        [sys.executable, "-c", SEGMENTS], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == f"{ {not said} }\n", done.stderr


def join_three_times(port: int) -> None:
    """As one rank of two that torchrun started. Once each rank joins late: by then the other would have met with what
    is left in the store of the world before."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": str(port)}
    for late in (None, "0", "1"):
        if os.environ["RANK"] == late:
            time.sleep(0.5)
        join_world(60)
        joined = connections()
        group = dist.new_group([0, 1])
        assert late or connections() == joined  # ranks that have not sent to each other are not connected
        wait_for_both()
        total = torch.ones(())
        dist.all_reduce(total)
        assert total == 2
        assert late or connections() > joined
        dist.barrier(group)
        leave_world()  # connections of this world may end within the next


def wait_for_both() -> None:
    """By the store, which connects no rank to another."""
    store = dist.distributed_c10d._get_default_store()
    store.add("both", 1)
    while store.add("both", 0) < 2:
        time.sleep(0.01)


def connections() -> int:
    """Of this process to others."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_socket():
            with socket.socket(fileno=os.dup(int(link.name))) as one, contextlib.suppress(OSError):
                found += bool(one.getpeername())
    return found


def test_a_process_joins_again_under_torchrun():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, which outlives worlds
    for process in fork_ranks(2, join_three_times, store.port):
        process.join(timeout=100)
        assert process.exitcode == 0


class Holder:
    """As an engine that is part of a reference cycle."""

    def __init__(self):
        self.released, self.cycle = 0, self

    def release(self):
        self.released += 1


def test_who_holds_communicators_is_told_of_the_end():
    holder = Holder()
    release_on_leaving(holder)
    leave_world()
    assert holder.released == 1


@contextlib.contextmanager
def world_of_two(rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "keeps"), [("cpu:gloo,cuda:nccl", True), ("cpu:gloo", False)])
def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch, backend, keeps):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backend)
    holder = Holder()
    release_on_leaving(holder)
    try:
        raise MemoryError
    except MemoryError:
        leave_world()
    assert (dist.is_initialized(), holder.released) == (keeps, not keeps)
    leave_world()
    assert (dist.is_initialized(), holder.released) == (False, 1)


def test_ranks_from_srun(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    scontrol.chmod(0o755)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back as it was, whatever the code under test sets
        monkeypatch.delenv(name)
    slurm = {"PROCID": "3", "LOCALID": "1", "STEP_NUM_TASKS": "4", "STEP_NODELIST": "node[7-8]", "JOB_ID": "54321"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert world.world_size() == 4
    world._translate_slurm()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "4", "1", "node7", "24321"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_out_of_memory_says_so(caplog, rank):
    """Command lines print rank 0's problems alone."""
    problem = "batch_tokens=8: out of memory: CUDA out of memory. Tried"
    with world_of_two(rank), pytest.raises(ConfigError, match=problem), memory_is_named("batch_tokens=8"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
    assert caplog.messages == [f"rank 1: {problem}"] * rank
