"""Tensor files: what the safetensors library reads, exactly what was asked for, and nothing that is damaged."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_tn.checkpoint import direct
from megatron_tn.checkpoint.files import TensorFile, stream_tensors, write_tensors
from megatron_tn.checkpoint.parts import FileRecord, digest_of, read_file
from megatron_tn.config import ConfigError
from megatron_tn.device.shared_memory import SharedMemory
from tests.helpers.waiting import no_waiting

TENSORS = {
    "a": torch.arange(1000.0),
    "empty": torch.empty(0),
    "b": torch.randn(3, generator=torch.Generator().manual_seed(0)),
    "rng/cpu": torch.arange(77, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / "file.safetensors", TENSORS)
    return tmp_path / "file.safetensors"


def test_a_fifo_is_refused_and_keeps_no_reader_waiting(tmp_path):
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    with no_waiting():
        with pytest.raises(ConfigError, match=r"model.safetensors cannot be read: not a regular file"):
            TensorFile(pipe)
        with pytest.raises(OSError, match="not a regular file"):  # of a checkpoint that is not verified
            read_file(pipe, direct.aligned_buffer(direct.ALIGNMENT))


def test_it_is_a_safetensors_file(path):
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def digest_by_definition(path: Path, part: int) -> str:
    data = path.read_bytes()
    parts = [hashlib.sha256(data[at : at + part]).digest() for at in range(0, len(data), part)]
    return f"{part}/{hashlib.sha256(b''.join(parts)).hexdigest()}"


@pytest.mark.parametrize("part", [4096, 3 * 4096, 8 << 20])
def test_the_record_and_the_bytes_are_the_same_however_the_file_is_cut(path, tmp_path, monkeypatch, part):
    """Tensors of one block, as a snapshot has them, among others: parts are written from the block or from a copy."""
    monkeypatch.setattr("megatron_tn.checkpoint.files.PART_BYTES", part)
    block = SharedMemory(20_000).block.copy_(torch.arange(20_000.0))
    tensors = {f"block/{number}": one for number, one in enumerate(block.split(4099))} | TENSORS
    record = write_tensors(path, tensors)
    assert record == FileRecord(path.stat().st_size, digest_by_definition(path, part))
    assert digest_of(path, record.sha256) == record.sha256
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest_of(path, "") == whole  # as older checkpoints have it
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    stream_tensors(tmp_path / "other", {n: (t.dtype, t.shape) for n, t in tensors.items()}, iter(tensors.values()))
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("refused", ["open", "pwrite", "preadv"])
def test_a_file_system_without_direct_io(path, tmp_path, monkeypatch, refused):
    real, said = getattr(os, refused), []

    def access(first, *more):
        flags = more[0] if refused == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(first, *more)

    monkeypatch.setattr(os, refused, access)
    monkeypatch.setattr(direct.log, "info", lambda *words: said.append(words))
    direct.say_refused.cache_clear()
    record = write_tensors(tmp_path / "other.safetensors", TENSORS)
    assert digest_of(tmp_path / "other.safetensors", record.sha256) == record.sha256
    assert (tmp_path / "other.safetensors").read_bytes() == path.read_bytes()
    assert len(said) == 1


@pytest.mark.parametrize(("chunk", "direct"), [(7, False), (1 << 20, False), (4096, True), (1 << 20, True)])
def test_a_range_reads_its_own_bytes_and_no_others(path, monkeypatch, chunk, direct):
    monkeypatch.setattr("megatron_tn.checkpoint.files.CHUNK_BYTES", chunk)
    monkeypatch.setattr("megatron_tn.checkpoint.files.WORTH_DIRECT", 0)
    file = TensorFile(path, direct=direct)
    before, values = file.bytes_read, torch.empty(50)
    file.read("a", 300, values)
    assert torch.equal(values, torch.arange(300.0, 350.0))
    assert file.bytes_read - before == 200
    rows = torch.empty(3, 5)
    file.read_rows("a", 300, 20, rows)
    assert torch.equal(rows, torch.arange(300.0, 360.0).view(3, 20)[:, :5])
    assert file.bytes_read - before == 260
    with pytest.raises(ConfigError, match="elements 300 to 345 were requested"):
        file.read_rows("rng/cpu", 300, 20, rows)
    assert torch.equal(file.get("a"), TENSORS["a"])
    assert torch.equal(file.get("rng/cpu"), TENSORS["rng/cpu"])  # up to the file's last byte
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is damaged: it ends at byte"):
        file.get("rng/cpu")
    file.close()


def with_header(header: dict, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("spaces", range(4))
def test_a_file_in_memory_gives_views(tmp_path, spaces):
    """At any byte a tensor of an older file may begin. Where several pieces of the file are in memory, also of values
    that span two; none of values that are not all there."""
    path, values = tmp_path / "a.safetensors", torch.arange(20.0)
    entries = {"a": {"shape": [20], "data_offsets": [0, 80]}, "none": {"shape": [0], "data_offsets": [80, 80]}}
    header = json.dumps({key: {"dtype": "F32"} | entry for key, entry in entries.items()}).encode() + b" " * spaces
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.numpy().tobytes())
    data, middle = np.fromfile(path, np.uint8), 8 + len(header) + 30
    pieces = [(0, data[:middle]), (middle, data[middle:])]
    for content, held in ((), []), ([(0, data)], [3, 8]), (pieces, [3, 8]), (pieces[1:], [8]):
        with contextlib.closing(TensorFile(path, content=content)) as file:
            for first in (3, 8):
                view, target = file.view("a", first, 10), torch.empty(10)
                assert view is None if first not in held else torch.equal(view, values[first : first + 10])
                file.read("a", first, target)
                assert torch.equal(target, values[first : first + 10])
            assert torch.equal(file.get("none"), torch.empty(0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\0" * 7, "ends at byte 7"),
        (struct.pack("<Q", 1 << 60) + b"{}", "a header of 1152921504606846976 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "its header"),
        (struct.pack("<Q", 2) + b"\xff\xff", "its header"),
        (with_header({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}), "a has type F64, not one of"),
        (with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}), "a does not follow"),
        (with_header({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}), "a does not follow"),
        (with_header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), "tensors end at byte"),
        (with_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}), "tensors end at byte"),
    ],
    ids=["empty", "short", "huge", "list", "bytes", "dtype", "negative", "shape", "past the end", "rest"],
)
def test_a_damaged_or_hostile_header_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        TensorFile(path)


def test_more_than_there_is_cannot_be_read(path):
    file = TensorFile(path)
    with pytest.raises(ConfigError, match="elements 999 to 1001"):
        file.read("a", 999, torch.empty(2))
    with pytest.raises(ConfigError, match="no tensor c"):
        file.get("c")
    file.close()
