"""Where documents come from: datatrove steps, made from the settings of the sources."""

import json
from pathlib import Path
from typing import BinaryIO

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.files import replace_file
from data_pipeline.readers.base import File, Items, Quarantined, glob_files, guarded
from data_pipeline.readers.lines import read_jsonl
from data_pipeline.readers.parquet import read_parquet, require_pyarrow
from data_pipeline.readers.tree import read_file, tree_files
from data_pipeline.readers.warc import read_warc
from data_pipeline.sources import Jsonl, Parquet, Source, Tree, Warc

__all__ = ["ReadSources", "list_files", "list_inputs"]


class ReadSources(PipelineStep):
    """Per task: the documents of every world_size-th file of each source, source by source.

    What is no document is recorded in quarantine/RANK.jsonl (id, source, bytes, reason, detail), and the rest goes on.
    """

    type = "📖 - READER"
    name = "sources"

    def __init__(self, sources: dict[str, Source], quarantine: Path):
        super().__init__()
        self.sources = sources
        self.quarantine = quarantine

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        records = []
        for name, source in self.sources.items():
            for file in list_files(name, source)[rank::world_size]:
                for item in _items(file, source):
                    identity = f"{file.id}:{item.place}" if item.place else file.id
                    if isinstance(item, Quarantined):
                        size = item.bytes if item.place else item.bytes or file.size
                        record = {"id": identity, "source": name, "bytes": size}
                        records.append({**record, "reason": item.reason, "detail": item.detail})
                    else:
                        metadata = {"source": name, **item.extra}
                        if source.language is not None:
                            metadata["language"] = source.language
                        yield Document(text=item.text, id=identity, metadata=metadata)
        if records:
            self.quarantine.mkdir(parents=True, exist_ok=True)
            lines = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
            replace_file(self.quarantine / f"{rank:05d}.jsonl", lines)


def list_files(name: str, source: Source) -> list[File]:
    """The files of a source, sorted. Raises InputError for one that is missing, empty or too small."""
    if isinstance(source, Parquet):
        require_pyarrow(name)
    return tree_files(name, source) if isinstance(source, Tree) else glob_files(name, source)


def list_inputs(sources: dict[str, Source]) -> list[tuple[str, int]]:
    """(identity, bytes) of every input file. Raises InputError as `list_files`."""
    return [(file.id, file.size) for name, source in sources.items() for file in list_files(name, source)]


def _items(file: File, source: Source) -> Items:
    def read() -> Items:
        with file.open() as opened:
            yield from _read(opened, source, file.id)

    return guarded(read())


def _read(opened: BinaryIO, source: Source, name: str) -> Items:
    match source:
        case Tree():
            return read_file(opened, source, name)
        case Jsonl():
            return read_jsonl(opened, source)
        case Parquet():
            return read_parquet(opened, source)
        case Warc():
            return read_warc(opened, source)
