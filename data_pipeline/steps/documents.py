"""Documents between two stages.

They are written once, by the rules, compressed; later stages record which of them go on and which lines they lose, and
whoever reads the documents applies that.
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
    """Where documents are. `written`: folder of a TaskWriter; `kept`: folder of a RecordKept, or None for all of them;
    `cuts`: folder of `save_cuts`, or None. Each has a file for each task."""

    written: Path
    kept: Path | None = None
    cuts: Path | None = None

    def tasks(self) -> list[int]:
        """The tasks that have written."""
        return sorted(int(path.name.removesuffix(SUFFIX)) for path in self.written.glob(f"*{SUFFIX}"))

    def read(self, rank: int) -> Iterator[Document]:
        """The documents of a task that are left, in order, without the lines that were cut. Their metadata has `place`,
        the number of the document in the task's file."""
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
    """Writes documents to the file of task `rank`, empty when there are none, and passes them on."""

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
    """Reads what is left of the documents of task `rank`. A file that is not there is an error, where datatrove's own
    reader would go on without it."""

    type = "📖 - READER"
    name = "task output"

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from self.stored.read(rank)


class RecordKept(PipelineStep):
    """Records the places of the documents that pass in folder/RANK.npy, int64 [documents], and passes them on."""

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
    """Writes {place of a document: numbers of the lines that it loses} of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{rank:05d}.json", json.dumps(cuts).encode())


def cut_lines(text: str, numbers: set[int]) -> str:
    """The text without the lines of these numbers, from 0, as `str.splitlines` counts them."""
    lines = text.splitlines(keepends=True)
    return "".join(line for number, line in enumerate(lines) if number not in numbers)
