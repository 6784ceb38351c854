"""Writes documents to tar shards whose bytes depend only on the documents."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np

from data_pipeline.files import open_temporary, replace_file, sha256_of
from data_pipeline.shards.content import Shard
from data_pipeline.shards.index import TEXT_BYTES, TOKENS, build_index, dump_index
from data_pipeline.shards.tar import TarWriter


class ShardWriter:
    """Writes documents to shards PREFIX-00000.tar, ... of about `shard_tokens` tokens each.

    A shard holds documents of one source, so that the stream can mix sources by shard: a change of source starts a new
    shard. A document longer than `shard_tokens` gets its own shard. A shard gets its final name when it is complete and
    has its index. Use as a context manager; `shards` lists the written shards.
    """

    def __init__(self, directory: str | Path, prefix: str, *, dtype: np.dtype, shard_tokens: int):
        self.directory = Path(directory)
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shard_tokens = shard_tokens
        self.shards: list[Shard] = []
        self._file = None
        self._tar = None
        self._documents = 0
        self._tokens = 0
        self._source = ""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            with contextlib.suppress(OSError):  # the disk may be full, and the file is deleted anyway
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.shards):05d}"

    def write(
        self, tokens: np.ndarray, *, id: str, source: str, text_bytes: int, language: str = "", key: str = ""
    ) -> None:
        """Appends a document: `tokens` [n] with bos and eos; `text_bytes`: UTF-8 length of its text; `language`: code,
        and `key`: name such as a URL, if known. Raises ValueError when a token id exceeds the stored dtype.
        """
        if tokens.size == 0 or tokens.min() < 0 or tokens.max() > np.iinfo(self.dtype).max:
            raise ValueError(f"document {id!r}: no tokens, or an id outside {self.dtype}")
        full = self._tokens + tokens.size > self.shard_tokens
        if self._file is not None and (full or source != self._source):
            self._finish()
        if self._file is None:
            self._start(source)
        metadata = {"id": id, "source": source, "language": language, "bytes": text_bytes, "tokens": int(tokens.size)}
        if key:
            metadata["key"] = key
        member = f"{self._name}_{self._documents:07d}"
        self._tar.write(f"{member}.json", json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode())
        self._tar.write(f"{member}.tokens", tokens.astype(self.dtype).tobytes())
        self._documents += 1
        self._tokens += tokens.size

    def _start(self, source: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._temporary, self._file = open_temporary(self.directory / f"{self._name}.tar")
        self._tar = TarWriter(self._file)
        self._documents = self._tokens = 0
        self._source = source

    def _finish(self) -> None:
        if self._file is None:
            return
        self._tar.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        # The index is built from the file on disk, so an unreadable shard is found here and not in training.
        index, _ = build_index(self._temporary, self.dtype.itemsize)
        index_path = self.directory / f"{self._name}.index.npy"
        replace_file(index_path, dump_index(index))
        shard = Shard(
            name=f"{self._name}.tar",
            source=self._source,
            documents=len(index),
            tokens=int(index[:, TOKENS].sum()),
            text_bytes=int(index[:, TEXT_BYTES].sum()),
            shortest_document=int(index[:, TOKENS].min()),
            size=self._temporary.stat().st_size,
            sha256=sha256_of(self._temporary),
            index=index_path.name,
            index_sha256=sha256_of(index_path),
        )
        os.replace(self._temporary, self.directory / shard.name)
        self._file.close()  # also releases the lock, which keeps other processes from removing the file
        self._file = self._tar = None
        self.shards.append(shard)
