"""Files in parts, which several threads hash, write and read beside each other.

A digest is "BYTES/HEX": the sha256 of the concatenated sha256s of the file's parts of BYTES bytes each, the last part
being what is left. Without "BYTES/" it is the sha256 of the file as one, as older checkpoints have it.
"""

import hashlib
import itertools
import os
import queue
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_tn.checkpoint.direct import (
    ALIGNMENT,
    DirectFile,
    aligned_buffer,
    buffer_of_this_thread,
    is_aligned,
    round_up,
)
from megatron_tn.config import regular
from megatron_tn.device.threads import in_parallel

READ_BYTES = 8 << 20  # at most: of one access of `digest_of`
IN_PARTS = re.compile(r"([1-9]\d{0,15})/[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """size: bytes. sha256: digest of the whole file, in parts (see above)."""

    size: int
    sha256: str


class _Part(NamedTuple):
    """data, aligned, at byte `at` of the file. buffer: the copy that `data` is the beginning of, where it was copied;
    None where it lies in the contents."""

    at: int
    data: np.ndarray
    buffer: np.ndarray | None = None


def write_file(path: Path, contents: Iterable[np.ndarray], part_bytes: int) -> FileRecord:
    """Write `contents`, uint8 [n] each, one after the other, and fsync. Hashing and writing release the GIL.

    `contents` is iterated in this thread; its arrays must not change before the return. A part that lies aligned in one
    array is written from there; else it is first copied, so beside the arrays of `contents` memory holds THREADS + 2
    parts at most.
    """
    digests: dict[int, bytes] = {}
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    size = 0

    def write(part: _Part) -> None:
        digests[part.at] = hashlib.sha256(part.data).digest()
        if part.buffer is None:
            file.write(part.data, part.at)
        else:  # the file's last part is written to the end of a block, and cut off below
            file.write(part.buffer[: round_up(len(part.data))], part.at)
            buffers.put(part.buffer)

    def counted() -> Iterator[_Part]:
        nonlocal size
        for part in _parts(contents, part_bytes, buffers):
            size = part.at + len(part.data)
            yield part

    with closing(DirectFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)) as file:
        in_parallel(write, counted())
        os.ftruncate(file.descriptor, size)
        os.fsync(file.descriptor)
    return FileRecord(size, _digest_of_parts([digests[at] for at in sorted(digests)], part_bytes))


def _parts(contents: Iterable[np.ndarray], part_bytes: int, buffers: queue.SimpleQueue[np.ndarray]) -> Iterator[_Part]:
    """`contents` cut into parts. buffers: those of parts that have been written."""
    at, buffer, filled = 0, None, 0
    for content in contents:
        done = 0
        while done < len(content):
            rest = content[done:]
            if not filled and len(rest) >= part_bytes and is_aligned(rest):
                yield _Part(at, rest[:part_bytes])
                at, done = at + part_bytes, done + part_bytes
                continue
            if buffer is None:
                buffer = aligned_buffer(part_bytes) if buffers.empty() else buffers.get()
            count = min(part_bytes - filled, len(rest))
            np.copyto(buffer[filled : filled + count], rest[:count])
            filled, done = filled + count, done + count
            if filled == part_bytes:
                yield _Part(at, buffer[:filled], buffer)
                at, buffer, filled = at + filled, None, 0
    if filled:
        yield _Part(at, buffer[:filled], buffer)


def read_file(path: Path, into: np.ndarray, first: int = 0) -> int:
    """Fill `into`, uint8, aligned, of `round_up(size)` bytes, with a file from byte `first` on, a multiple of
    ALIGNMENT. Returns how many bytes were read.

    Raises:
        OSError: the file cannot be read.
    """
    counts: list[int] = []
    with closing(DirectFile(regular(path), os.O_RDONLY)) as file:
        in_parallel(
            lambda at: counts.append(file.read(into[at : at + READ_BYTES], first + at)), range(0, len(into), READ_BYTES)
        )
    return sum(counts)


def digest_of(path: Path, like: str, into: np.ndarray | None = None) -> str:
    """The digest of a file, in parts or as one as the digest `like` is. Reads every byte once, from the disk.

    into: filled with the file, as by `read_file`.

    Raises:
        OSError: the file cannot be read.
    """
    with closing(DirectFile(path, os.O_RDONLY)) as file:
        if part_bytes := _part_bytes_of(like):
            return joined_digest([_in_parts(file, 0, os.fstat(file.descriptor).st_size, part_bytes, into)], like)
        return _as_one(file, into)


def digests_of_share(path: Path, like: str, first: int, last: int, into: np.ndarray | None) -> dict[int, bytes]:
    """`digest_of` for bytes [first, last) of a file, a share by `share_of`: first byte -> digest of each part."""
    with closing(DirectFile(path, os.O_RDONLY)) as file:
        return _in_parts(file, first, last, _part_bytes_of(like), into)


def joined_digest(shares: Iterable[Mapping[int, bytes]], like: str) -> str:
    """The digest of a file, as `like` is, by `digests_of_share` of all its shares."""
    parts = sorted(part for share in shares for part in share.items())
    return _digest_of_parts([digest for _, digest in parts], _part_bytes_of(like))


def share_of(record: FileRecord, number: int, count: int) -> tuple[int, int]:
    """Bytes [first, last) of share `number` of `count` of a file: whole parts, about equally many in each. Share 0
    is all of a file that has a digest as one."""
    part_bytes = _part_bytes_of(record.sha256) or max(record.size, 1)
    parts = -(-record.size // part_bytes)
    first, last = (-(-parts * end // count) * part_bytes for end in (number, number + 1))
    return min(first, record.size), min(last, record.size)


def _in_parts(file: DirectFile, first: int, last: int, part_bytes: int, into: np.ndarray | None) -> dict[int, bytes]:
    digests: dict[int, bytes] = {}

    def read(at: int) -> None:
        digest = hashlib.sha256()
        for start in range(at, min(at + part_bytes, last), READ_BYTES):
            buffer = buffer_of_this_thread(READ_BYTES) if into is None else into[start - first :]
            data = buffer[: min(READ_BYTES, at + part_bytes - start)]
            digest.update(data[: file.read(data, start)])
        digests[at] = digest.digest()

    in_parallel(read, range(first, last, part_bytes))
    return digests


def _as_one(file: DirectFile, into: np.ndarray | None) -> str:
    """Digest of the file as one: a thread hashes while this one reads."""
    digest, buffers = hashlib.sha256(), [aligned_buffer(READ_BYTES) for _ in range(4)] if into is None else []

    def chunks() -> Iterator[np.ndarray]:
        for number in itertools.count():  # in_parallel of one thread is three chunks behind at most
            start = number * READ_BYTES
            buffer = buffers[number % len(buffers)] if into is None else into[start : start + READ_BYTES]
            if not (count := file.read(buffer, start)):
                return
            yield buffer[:count]

    in_parallel(digest.update, chunks(), threads=1)
    return digest.hexdigest()


def _digest_of_parts(digests: Iterable[bytes], part_bytes: int) -> str:
    return f"{part_bytes}/{hashlib.sha256(b''.join(digests)).hexdigest()}"


def _part_bytes_of(digest: str) -> int:
    """BYTES of a digest; 0 for the file as one, and for a damaged digest, which no file has."""
    found = IN_PARTS.fullmatch(digest)
    size = int(found[1]) if found else 0
    return 0 if size % ALIGNMENT else size
