"""Documents between stages.

The rules stage writes them once, compressed. Later stages record only kept documents and cut lines; readers apply these
records.
"""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from zstandard import ZstdCompressor, ZstdDecompressor

from data_pipeline.files import replace_file, replacing

SUFFIX = ".jsonl.zst"


@dataclass(frozen=True)
class Stored:
    """Folders of stored documents, each with a file per task. `written`: by TaskWriter; `kept`: by RecordKept, None:
    all documents are kept; `cuts`: by `save_cuts`, or None."""

    written: Path
    kept: Path | None = None
    cuts: Path | None = None

    def tasks(self) -> list[int]:
        return sorted(int(path.name.removesuffix(SUFFIX)) for path in self.written.glob(f"*{SUFFIX}"))

    def read(self, rank: int) -> Iterator[Document]:
        """The kept documents of a task, in order, without cut lines. Metadata `place`: index of the document in the
        task's file."""
        kept = set(np.load(self.kept / f"{rank:05d}.npy", allow_pickle=False).tolist()) if self.kept else None
        cuts = json.loads((self.cuts / f"{rank:05d}.json").read_bytes()) if self.cuts else {}
        with (self.written / f"{rank:05d}{SUFFIX}").open("rb") as file:
            for place, line in enumerate(io.BufferedReader(ZstdDecompressor().stream_reader(file))):
                if kept is not None and place not in kept:
                    continue
                record = orjson.loads(line)
                text, cut = record["text"], cuts.get(str(place))
                if cut:
                    text = cut_lines(text, set(cut))
                yield Document(text=text, id=record["id"], metadata={**record["metadata"], "place": place})


class TaskWriter(PipelineStep):
    """Writes documents to the file of task `rank`, even if there are none, and passes them on."""

    type = "💽 - WRITER"
    name = "task output"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        packer = ZstdCompressor(level=1)
        with (
            replacing(self.folder / f"{rank:05d}{SUFFIX}") as file,
            packer.stream_writer(file, closefd=False) as packed,
        ):
            for document in data:
                record = {"text": document.text, "id": document.id, "metadata": document.metadata}
                packed.write(orjson.dumps(record) + b"\n")
                yield document


class TaskReader(PipelineStep):
    """Reads the kept documents of task `rank`. A missing file is an error; datatrove's own reader would skip it."""

    type = "📖 - READER"
    name = "task output"

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from self.stored.read(rank)


class RecordKept(PipelineStep):
    """Records `place` of each document it receives in folder/RANK.npy, int64 [documents], and passes them on."""

    type = "💽 - WRITER"
    name = "record kept"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        places = []
        for document in data:
            places.append(document.metadata["place"])
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{rank:05d}.npy") as file:
            np.save(file, np.array(places, dtype=np.int64))


class RemoveFolders(PipelineStep):
    """In one task: removes folders that no later stage reads."""

    type = "🧹 - CLEAN"
    name = "remove folders"

    def __init__(self, folders: list[Path]):
        super().__init__()
        self.folders = folders

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        return data


def save_cuts(folder: Path, rank: int, cuts: dict[int, list[int]]) -> None:
    """Writes a task's {place of a document: numbers of its cut lines}."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{rank:05d}.json", json.dumps(cuts).encode())


def cut_lines(text: str, numbers: set[int]) -> str:
    """The text without the lines `numbers`, counted from 0 as by `str.splitlines`."""
    lines = text.splitlines(keepends=True)
    return "".join(line for number, line in enumerate(lines) if number not in numbers)
