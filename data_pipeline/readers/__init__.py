"""Readers: datatrove steps that read the sources' documents."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.errors import InputError
from data_pipeline.files import replacing
from data_pipeline.readers.base import File, Found, Items, Quarantined, guarded
from data_pipeline.readers.lines import read_jsonl
from data_pipeline.readers.listing import Listing, glob_listing
from data_pipeline.readers.parquet import read_parquet, require_pyarrow
from data_pipeline.readers.tree import read_file, tree_listing
from data_pipeline.readers.warc import read_warc
from data_pipeline.sources import Jsonl, Parquet, Source, Tree, Warc

__all__ = ["ReadSources", "documents_of", "input_sizes", "inputs_hash", "list_source"]

LONGEST_DETAIL = 500  # characters of `detail`, as a URL may be very long


class ReadSources(PipelineStep):
    """Per task: the documents of every world_size-th file of each source, source by source.

    Unusable records are listed in quarantine/RANK.jsonl (id, source, bytes, reason, detail), and reading continues.
    inputs: `inputs_hash` of the files at the run's start; a task that finds other files raises InputError, since an
    added or removed file would shift the assignment of files to tasks.
    """

    type = "📖 - READER"
    name = "sources"

    def __init__(self, sources: dict[str, Source], quarantine: Path, inputs: str | None = None):
        super().__init__()
        self.sources = sources
        self.quarantine = quarantine
        self.inputs = inputs

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        files = {name: list_source(name, source).files for name, source in self.sources.items()}
        if self.inputs not in (None, inputs_hash([item for found in files.values() for item in input_sizes(found)])):
            raise InputError(
                "sources: files were added or removed, or have another size, since this run began: restore them, or "
                "set overwrite=true to begin anew"
            )
        # Written at once, not collected: in a garbage file, every line is a record.
        with contextlib.ExitStack() as stack:
            records = None
            for name, source in self.sources.items():
                for file in files[name][rank::world_size]:
                    for item in _items(file, source):
                        if isinstance(item, Found):
                            yield _document(item, file, name, source)
                            continue
                        if records is None:
                            self.quarantine.mkdir(parents=True, exist_ok=True)
                            records = stack.enter_context(replacing(self.quarantine / f"{rank:05d}.jsonl"))
                        record = _record(item, file, name)
                        records.write(
                            json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
                        )


def documents_of(file: File, name: str, source: Source) -> Iterator[Document]:
    """The documents of one file of source `name`, without what is quarantined."""
    for item in _items(file, source):
        if isinstance(item, Found):
            yield _document(item, file, name, source)


def _document(item: Found, file: File, name: str, source: Source) -> Document:
    metadata = {"source": name, **item.extra}
    if source.language is not None:
        metadata["language"] = source.language
    return Document(text=item.text, id=_identity(item, file), metadata=metadata)


def _record(item: Quarantined, file: File, name: str) -> dict:
    size = item.bytes if item.place else item.bytes or file.size
    detail = item.detail if len(item.detail) <= LONGEST_DETAIL else item.detail[:LONGEST_DETAIL] + "..."
    return {"id": _identity(item, file), "source": name, "bytes": size, "reason": item.reason, "detail": detail}


def _identity(item: Found | Quarantined, file: File) -> str:
    return f"{file.id}:{item.place}" if item.place else file.id


def list_source(name: str, source: Source) -> Listing:
    """The files of a source, and notes on skipped files. Raises InputError for a source that is missing, empty or too
    small."""
    if isinstance(source, Parquet):
        require_pyarrow(name)
    return tree_listing(name, source) if isinstance(source, Tree) else glob_listing(name, source)


def inputs_hash(inputs: list[tuple[str, int]]) -> str:
    """sha256, hex, over the `input_sizes` of all input files; independent of its order."""
    return hashlib.sha256(json.dumps(sorted(inputs)).encode()).hexdigest()


def input_sizes(files: list[File]) -> list[tuple[str, int]]:
    """(identity, bytes) of files."""
    return [(file.id, file.size) for file in files]


def _items(file: File, source: Source) -> Items:
    def read() -> Items:
        with file.open() as opened:
            yield from _read(opened, source, file)

    return guarded(read())


def _read(opened: BinaryIO, source: Source, file: File) -> Items:
    match source:
        case Tree():
            return read_file(opened, source, file.id)
        case Jsonl():
            return read_jsonl(opened, source)
        case Parquet():
            return read_parquet(opened, source, file.size)
        case Warc():
            return read_warc(opened, source, file.size)
