"""Documents on disk between two stages: one file of JSON lines for each task."""

from collections.abc import Iterator
from pathlib import Path

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.files import replacing


class TaskReader(PipelineStep):
    """Reads what task `rank` of an earlier stage wrote: duplicates are recorded by task and place in the task's file.
    A file that is not there or not whole is an error, where datatrove's own reader would go on without it."""

    type = "📖 - READER"
    name = "task output"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from read_documents(self.folder / f"{rank:05d}.jsonl")


def read_documents(path: Path) -> Iterator[Document]:
    """The documents that a TaskWriter wrote to `path`."""
    with path.open("rb") as lines:
        for line in lines:
            record = orjson.loads(line)
            yield Document(text=record["text"], id=record["id"], metadata=record["metadata"])


class TaskWriter(PipelineStep):
    """Writes documents to the file of task `rank`, empty when there are none, and passes them on."""

    type = "💽 - WRITER"
    name = "task output"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{rank:05d}.jsonl") as file:
            for document in data:
                record = {"text": document.text, "id": document.id, "metadata": document.metadata}
                file.write(orjson.dumps(record) + b"\n")
                yield document
