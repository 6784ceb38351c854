"""Tensor files: what the safetensors library reads, exactly what was asked for, and nothing that is damaged."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import load_file

from megatron_tn.checkpoint.files import TensorFile, write_tensors
from megatron_tn.config import ConfigError

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


def test_it_is_a_safetensors_file(path):
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_the_record_is_of_the_whole_file(path, monkeypatch):
    monkeypatch.setattr("megatron_tn.checkpoint.files.CHUNK_BYTES", 100)
    record = write_tensors(path, TENSORS)
    assert (record.size, record.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_a_range_reads_its_own_bytes_and_no_others(path, monkeypatch, chunk):
    monkeypatch.setattr("megatron_tn.checkpoint.files.CHUNK_BYTES", chunk)
    file = TensorFile(path)
    before, values = file.bytes_read, torch.empty(50)
    file.read("a", 300, values)
    assert torch.equal(values, torch.arange(300.0, 350.0))
    assert file.bytes_read - before == 200
    assert torch.equal(file.get("rng/cpu"), TENSORS["rng/cpu"])
    file.close()


def with_header(header: dict, data: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends at byte 0"),
        (b"\0" * 7, "ends at byte 7"),
        (struct.pack("<Q", 1 << 60) + b"{}", "a header of 1152921504606846976 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "its header"),
        (struct.pack("<Q", 2) + b"\xff\xff", "its header"),
        (with_header({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}), "its header: KeyError: 'F64'"),
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
