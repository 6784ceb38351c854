"""Reading ahead: every byte is read from the disk once, checked, and what the load takes is in memory."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tn.checkpoint.ahead import Contents, Holding, Place, ReadAhead
from megatron_tn.checkpoint.background import CheckpointWriter
from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.manifest import MANIFEST, rank_file
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.device.shared_memory import Address
from megatron_tn.engine.build import initialize_engine
from tests.checkpoint.engines import make_engine, reads
from tests.checkpoint.test_background import content
from tests.engine.test_parity import LOCAL
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.ranks import run_shared


@pytest.fixture
def engine():
    config, engine = make_engine(1, LOCAL)
    initialize_engine(engine, seed=5)
    engine.run_config = config
    return engine


@pytest.fixture
def checkpoint(engine, tmp_path) -> Path:
    return save_checkpoint(engine, tmp_path, step=1, **content(engine.run_config, 1))


def values_of(engine) -> list[torch.Tensor]:
    return [values.clone() for owned in engine.owned_ranges() for values in owned.values.values()]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("digest", ["in parts", "as one"])
def test_the_disk_is_read_once(engine, checkpoint, verify, digest):
    file, wanted = checkpoint / rank_file(0), values_of(engine)
    if digest == "as one":  # of an older checkpoint
        values = json.loads((checkpoint / MANIFEST).read_text())
        values["files"][file.name]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        (checkpoint / MANIFEST).write_text(json.dumps(values))
    memory = HostMemory()
    with reads() as counts:
        ahead = ReadAhead(0, 1, memory, verify=verify, pinned=False)
        ahead.begin(checkpoint)
        assert ahead.problems(checkpoint) == []
        for values in (values for owned in engine.owned_ranges() for values in owned.values.values()):
            values.fill_(7)
        with ahead.contents(checkpoint) as contents:
            load_checkpoint(engine, checkpoint, contents)
    assert all(map(torch.equal, values_of(engine), wanted))
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert size <= sum(counts) <= size + 2 * header
    # The next save uses the same memory.
    ahead.forget()
    with ahead.contents(checkpoint) as contents:
        assert not contents
    block = memory.take(size // 8, pinned=False)
    writer = CheckpointWriter(checkpoint.parent, Retention(), background=True, timeout_s=60, memory=memory)
    writer.save(engine, 2, **content(engine.run_config, 2))
    assert block.data_ptr() == memory.take(1, pinned=False).data_ptr()
    again = writer.close().path
    assert (again / file.name).read_bytes() == file.read_bytes()


def read_shares(checkpoint: Path, verify: bool) -> tuple[list[str], int, list[int]]:
    """On each rank: problems, bytes that it read ahead, and bytes in the memory of each rank, of the one file of
    `checkpoint`. The load takes them from there, and reads the header alone."""
    _, engine = make_engine(1, LOCAL)
    load_checkpoint(engine, checkpoint)
    wanted, context = values_of(engine), engine.context
    with reads() as counts:
        ahead = ReadAhead(context.rank, context.world_size, HostMemory(), verify=verify, pinned=False)
        ahead.begin(checkpoint)
        problems = ahead.problems(checkpoint)
        ahead.memory.join()
    for values in (values for owned in engine.owned_ranges() for values in owned.values.values()):
        values.fill_(7)
    with ahead.contents(checkpoint) as contents:
        held = [len(data) for _, data in contents[rank_file(0)]]
        with reads() as more:
            load_checkpoint(engine, checkpoint, contents)
    assert all(map(torch.equal, values_of(engine), wanted))
    assert sum(more) == 8 + int.from_bytes((checkpoint / rank_file(0)).read_bytes()[:8], "little")
    return problems, sum(counts), held


@pytest.mark.parametrize("verify", [True, False])
def test_ranks_share_a_file_where_there_are_fewer(engine, tmp_path, monkeypatch, verify):
    """Each reads and keeps whole parts of it, a third of the bytes."""
    part = 16 << 10
    monkeypatch.setattr("megatron_tn.checkpoint.files.PART_BYTES", part)
    checkpoint = save_checkpoint(engine, tmp_path, step=1, **content(engine.run_config, 1))
    file = checkpoint / rank_file(0)
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little") + 8
    for problems, read, held in run_shared(3, read_shares, checkpoint, verify):
        assert problems == []
        assert read <= size / 3 + part + header
        assert sum(held) == size
        assert max(held) <= size / 3 + part
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"\xff\xfe\xff\xfe")
    first, *others = [problems for problems, _, _ in run_shared(3, read_shares, checkpoint, verify)]
    assert others == [[], []]
    assert [line.partition(" its")[0] for line in first] == [f"{file} is damaged:"] * verify


def problems_on_a_rank(checkpoint: Path) -> list[str]:
    return ReadAhead(dist.get_rank(), dist.get_world_size(), None, verify=True, pinned=False).problems(checkpoint)


def test_a_damaged_header_of_a_shared_file_is_one_line(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_tn.checkpoint.files.PART_BYTES", 16 << 10)
    checkpoint = save_checkpoint(engine, tmp_path, step=1, **content(engine.run_config, 1))
    file = checkpoint / rank_file(0)
    with file.open("r+b") as opened:
        opened.seek(8)
        opened.write(b"[")
    (line,), *others = run_shared(3, problems_on_a_rank, checkpoint)
    assert line.startswith(f"{file} is damaged: its header: ")
    assert others == [[], []]


@pytest.mark.parametrize("kept", ["memory", "no memory", "not enough"])
def test_damage_is_found_wherever_the_bytes_go(checkpoint, monkeypatch, kept):
    file = checkpoint / rank_file(0)
    with file.open("r+b") as opened:
        opened.seek(-1000, os.SEEK_END)
        opened.write(b"\xff\xfe")
    if kept == "not enough":
        monkeypatch.setattr("megatron_tn.device.host_memory.SharedMemory", lambda elements: 1 / 0)
    memory = None if kept == "no memory" else HostMemory()
    ahead = ReadAhead(0, 1, memory, verify=True, pinned=False)
    ahead.begin(checkpoint)
    (problem,) = ahead.problems(checkpoint)
    assert problem.startswith(f"{file} is damaged: its sha256 is ")
    with ahead.contents(checkpoint) as contents:
        assert not contents
    file.unlink()
    assert ReadAhead(0, 1, memory, verify=True, pinned=False).problems(checkpoint) == [f"{file} is missing"]
    assert ReadAhead(0, 1, memory, verify=False, pinned=False).problems(checkpoint) == []
    assert ReadAhead(1, 2, memory, verify=True, pinned=False).problems(checkpoint) == []  # another rank's file


def test_what_another_machine_holds_is_read_from_the_disk():
    elsewhere = Address(f"/proc/{os.getpid()}/fd/0", "/memfd:megatron_tn-of-another-machine (deleted)")
    contents = Contents({}, [Holding(elsewhere, {rank_file(1): Place(0, 0, 4096)})])
    assert contents.get(rank_file(1)) is None
