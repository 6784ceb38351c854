"""Counts of the documents between two stages, by source and language."""

import json
from collections import defaultdict
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.document import text_bytes
from data_pipeline.files import replace_file


class Tally(PipelineStep):
    """Passes documents on and writes their counts to folder/RANK.json: [source, language, documents, bytes] each."""

    type = "📊 - STATS"
    name = "tally"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        counts = defaultdict(lambda: [0, 0])
        for document in data:
            count = counts[document.metadata["source"], document.metadata.get("language", "")]
            count[0] += 1
            count[1] += text_bytes(document)
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [[*key, *count] for key, count in sorted(counts.items())]
        replace_file(self.folder / f"{rank:05d}.json", json.dumps(rows).encode())


def read_tally(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """{(source, language): (documents, bytes)} over all tasks of a Tally."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for path in sorted(folder.glob("*.json")):
        for source, language, documents, size in json.loads(path.read_bytes()):
            before = counts.get((source, language), (0, 0))
            counts[source, language] = (before[0] + documents, before[1] + size)
    return counts
