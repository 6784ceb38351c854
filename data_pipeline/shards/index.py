"""Index of a tar shard: position of each document's tokens, for random access.

An index is an .npy file of int64 [documents, 4]: byte offset of the `.tokens` payload in the tar, its length in tokens
(bos and eos included), the UTF-8 bytes of its text, and its language: the ASCII bytes of the code, such as `en`, as a
little-endian number, 0 where unknown.
"""

import io
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shards.content import Shard

OFFSET, TOKENS, TEXT_BYTES, LANGUAGE = range(4)
COLUMNS = 4
HEADER_BYTES = 4096  # maximum header size of an .npy file
MOST = 2**53  # maximum tokens or bytes of a document
LONGEST_METADATA = 1 << 20  # bytes of a document's JSON
LONGEST_LANGUAGE = 7  # bytes of a code; the eighth byte of an int64 has its sign


def safe_members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Each member of a tar, in order. Raises InputError naming a member that is a link, a device or a folder, or whose
    name is absolute or leads out of the archive; and naming the shard when it is not a tar or is truncated."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg():
                    kind = "a link" if member.issym() or member.islnk() else "not a plain file"
                    raise InputError(f"shard {path.name}: member {member.name!r} is {kind}: refused")
                if member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
                    raise InputError(f"shard {path.name}: member {member.name!r} leads out of the archive: refused")
                yield tar, member
    except InputError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        # The latter ones come of extended headers: thousands in a row, or one that claims a terabyte.
        raise InputError(f"shard {path.name}: not a whole tar file: {error or type(error).__name__}") from None
    except OSError as error:
        raise InputError(f"shard {path.name}: {error.strerror or error}") from None


def language_number(code: str) -> int:
    """A language code as stored in an index; raises InputError if it is too long or not ASCII."""
    if len(code) > LONGEST_LANGUAGE or not code.isascii():
        raise InputError(f"language={code!r} is not an ASCII code of at most {LONGEST_LANGUAGE} characters")
    return int.from_bytes(code.encode(), "little")


def language_code(number: int) -> str:
    """The inverse of `language_number`."""
    return int(number).to_bytes(8, "little").rstrip(b"\0").decode("ascii", "replace")


def build_index(path: Path, itemsize: int) -> tuple[np.ndarray, list[dict]]:
    """Reads a shard: (index [documents, 4], each document's metadata). `itemsize`: bytes per stored token. Raises
    InputError naming shard and member for a duplicate or unpaired key and for metadata that contradicts the tokens."""
    rows, metadata, keys = [], [], set()
    pending: dict[str, tuple[dict, int]] = {}
    for tar, member in safe_members(path):
        key, _, extension = member.name.partition(".")
        where = f"shard {path.name}: member {member.name!r}"
        if extension == "json" and member.size > LONGEST_METADATA:
            raise InputError(f"{where}: {member.size} bytes of metadata, more than {LONGEST_METADATA}")
        if extension == "json" and key not in pending and key not in keys:
            payload = tar.extractfile(member).read()
            if len(payload) != member.size:
                raise InputError(f"{where}: truncated")
            pending[key] = (_metadata(payload, where), member.size)
        elif extension == "tokens" and key in pending:
            record, _ = pending.pop(key)
            if member.size != record["tokens"] * itemsize:
                raise InputError(f"{where}: {member.size} bytes are not tokens={record['tokens']} of {itemsize} bytes")
            keys.add(key)
            rows.append((member.offset_data, record["tokens"], record["bytes"], language_number(record["language"])))
            metadata.append(record)
        else:
            raise InputError(f"{where}: duplicate key, or not one .json followed by its .tokens")
    if pending:
        raise InputError(f"shard {path.name}: key {next(iter(pending))!r} has metadata but no tokens")
    return np.array(rows, dtype=np.int64).reshape(-1, COLUMNS), metadata


def _metadata(payload: bytes, where: str) -> dict:
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    sizes = ("tokens", "bytes")
    if not isinstance(record, dict) or any(type(record.get(key)) is not int or record[key] < 0 for key in sizes):
        raise InputError(f"{where}: metadata lacks a count of tokens or bytes")
    if any(record[key] > MOST for key in sizes):
        raise InputError(f"{where}: metadata counts more than {MOST} tokens or bytes")
    if any(type(record.setdefault(key, "")) is not str for key in ("source", "language")):
        raise InputError(f"{where}: metadata has a source or language that is no string")
    try:
        language_number(record["language"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return record


def dump_index(index: np.ndarray) -> bytes:
    """An index as the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    return buffer.getvalue()


def index_bytes(documents: int) -> int:
    """Maximum size in bytes of an index of `documents` documents."""
    return documents * COLUMNS * np.dtype(np.int64).itemsize + HEADER_BYTES


def read_npy(data: bytes, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The array of an .npy file, which must have this shape and dtype. Raises ValueError for anything else, including a
    pickle.

    Not np.load, which parses the header with ast.literal_eval: in Python 3.11, it sometimes fails when several threads
    (such as readers) parse at once.
    """
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    expected = header.getvalue()
    if data[: len(expected)] != expected or len(data) - len(expected) != np.dtype(dtype).itemsize * math.prod(shape):
        raise ValueError(f"not {np.dtype(dtype)} {list(shape)}")
    return np.frombuffer(data, dtype, offset=len(expected)).reshape(shape)


def parse_index(data: bytes, shard: Shard, itemsize: int) -> np.ndarray:
    """The index [documents, 4] of a shard, whose tokens have `itemsize` bytes. Raises InputError naming the file when
    it holds a pickle, is damaged, or does not fit the shard."""
    name = shard.index
    try:
        index = read_npy(data, (shard.documents, COLUMNS), np.int64)
    except ValueError as error:
        raise InputError(f"index {name}: {error}") from None
    lengths, offsets = index[:, TOKENS], index[:, OFFSET]
    if (lengths < 1).any() or lengths.sum() != shard.tokens:
        raise InputError(f"index {name}: lengths sum to {lengths.sum()} tokens, the manifest says {shard.tokens}")
    if (offsets < 0).any() or (lengths > (shard.size - offsets) // itemsize).any():
        raise InputError(f"index {name}: a document lies outside the shard's {shard.size} bytes")
    return index
