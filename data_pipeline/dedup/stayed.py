"""Names the copy that stayed in the record of each dropped duplicate.

A duplicate and the copy that stays may be in different tasks. So the stage that drops duplicates records which copies
stay, and the last stage adds their ids to the records of drops.
"""

import json
from collections.abc import Callable
from pathlib import Path

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.files import replace_file, replacing


class RecordStayed(PipelineStep):
    """Per task: folder/RANK.json, {group: id} of the documents that stay of a group of duplicates. group(document): as
    `value` in the records of drops; None for a document without duplicates."""

    type = "🫂 - DEDUP"
    name = "record stayed"

    def __init__(self, folder: Path, group: Callable[[Document], str | None]):
        super().__init__()
        self.folder = folder
        self.group = group

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        stayed = {}
        for document in data:
            if group := self.group(document):
                stayed[group] = document.id
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / f"{rank:05d}.json", json.dumps(stayed).encode())


class NameStayed(PipelineStep):
    """In one task: adds `kept`, the id of the copy that stayed, to the records of drops/*.jsonl."""

    type = "🫂 - DEDUP"
    name = "name stayed"

    def __init__(self, stayed: Path, drops: Path):
        super().__init__()
        self.stayed = stayed
        self.drops = drops

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        stayed: dict[str, str] = {}
        for path in sorted(self.stayed.glob("*.json")):
            stayed |= json.loads(path.read_bytes())
        for path in sorted(self.drops.glob("*.jsonl")):
            with path.open("rb") as records, replacing(path) as named:
                for record in map(orjson.loads, records):
                    excerpt = record.pop("excerpt")
                    # A run killed while the folders of ids were being removed has `kept` in the record already.
                    kept = stayed.get(record["value"]) or record["kept"]
                    named.write(orjson.dumps({**record, "kept": kept, "excerpt": excerpt}) + b"\n")
        return data
