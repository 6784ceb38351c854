"""Removes lines that many documents share: menus, notices, watermarks.

Three stages: each task counts its lines by hash; each of as many hash ranges is summed over all tasks; each task
removes the lines found too often. Lines of code in Markdown stay.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Container
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import LineDuplicates
from data_pipeline.document import text_bytes
from data_pipeline.files import replace_file
from data_pipeline.letters import composed, plain
from data_pipeline.protected import masked
from data_pipeline.steps.documents import cut_lines, save_cuts
from data_pipeline.steps.drops import drop_writer, rule_drop

DIGIT = re.compile(r"\d")
ASCII_DIGITS = str.maketrans("123456789", "000000000")
COUNTED = np.dtype([("hash", "<u8"), ("documents", "<u4")])


def line_hashes(text: str, least: int) -> list[int | None]:
    """A 64-bit hash per line that ignores case, the values of digits and the width of white space: "page 3 of 7" equals
    "Page 4  of 7". None for a stripped line of fewer than `least` characters, which is not compared."""
    if text.isascii():
        compared = text.lower().translate(ASCII_DIGITS).splitlines()
        counted = compared
    else:
        compared = DIGIT.sub("0", composed(text).lower()).splitlines()
        counted = plain(text).splitlines()
    return [
        line_hash(line) if len(count.strip()) >= least else None for line, count in zip(compared, counted, strict=True)
    ]


def line_hash(line: str) -> int:
    """64-bit hash of a line, with each run of white space as one space."""
    letters = " ".join(line.split())
    return int.from_bytes(hashlib.blake2b(letters.encode(), digest_size=8).digest(), "little")


class CountLines(PipelineStep):
    """Per task: number of its documents that have each line, sorted by hash. Passes the documents on."""

    type = "🫂 - DEDUP"
    name = "count lines"

    def __init__(self, settings: LineDuplicates, folder: Path):
        super().__init__()
        self.settings = settings
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        counts: Counter[int] = Counter()
        for document in data:
            counts.update(set(line_hashes(document.text, self.settings.min_characters)) - {None})
            yield document
        counted = np.array(sorted(counts.items()), dtype=COUNTED)
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{rank:05d}.npy", counted)


class FindLines(PipelineStep):
    """Per hash range: the lines that occur in at least `min_documents` documents of all tasks."""

    type = "🫂 - DEDUP"
    name = "find lines"

    def __init__(self, settings: LineDuplicates, counts: Path, output: Path):
        super().__init__()
        self.settings = settings
        self.counts = counts
        self.output = output

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        bounds = np.array([rank * 2**64 // world_size, (rank + 1) * 2**64 // world_size - 1], dtype=np.uint64)
        parts = []
        for path in sorted(self.counts.glob("*.npy")):
            counted = np.load(path, mmap_mode="r", allow_pickle=False)
            first = np.searchsorted(counted["hash"], bounds[0], side="left")
            last = np.searchsorted(counted["hash"], bounds[1], side="right")
            parts.append(np.array(counted[first:last]))
        together = np.concatenate(parts)
        hashes, places = np.unique(together["hash"], return_inverse=True)
        documents = np.bincount(places, weights=together["documents"], minlength=len(hashes)).astype(np.uint32)
        often = documents >= self.settings.min_documents
        found = np.empty(int(often.sum()), dtype=COUNTED)
        found["hash"], found["documents"] = hashes[often], documents[often]
        self.output.mkdir(parents=True, exist_ok=True)
        np.save(self.output / f"{rank:05d}.npy", found)
        return data


class RemoveLines(PipelineStep):
    """Per task: removes the lines found, recording their numbers in `cuts` and an edit in `edited`, and drops documents
    that keep less than the share `min_kept` of their characters."""

    type = "🫂 - DEDUP"
    name = "remove lines"

    def __init__(self, settings: LineDuplicates, found: Path, cuts: Path, drops: Path, edited: Path):
        super().__init__()
        self.settings = settings
        self.found = found
        self.cuts = cuts
        self.drops = drop_writer(drops, rule_drop)
        self.edited = edited

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        found = np.concatenate([np.load(path, allow_pickle=False) for path in sorted(self.found.glob("*.npy"))])
        often = dict(zip(found["hash"].tolist(), found["documents"].tolist(), strict=True))
        records, cuts = [], {}
        with self.drops as drops:
            for document in data:
                before, text = text_bytes(document), document.text
                hashes = line_hashes(text, self.settings.min_characters)
                hits = [often[found] for found in hashes if found in often]
                if hits:
                    cut = lines_to_cut(text, hashes, often)
                    document.text = cut_lines(text, cut)
                    kept = len(document.text.strip()) / len(text)
                    if kept < self.settings.min_kept:
                        reason = {"measure": "min_kept", "value": kept, "threshold": self.settings.min_kept}
                        document.metadata["drop"] = {"filter": "line_duplicates", **reason}
                        document.text = text
                        drops.write(document, rank)
                        continue
                    if document.text != text:
                        cuts[document.metadata["place"]] = sorted(cut)
                        records.append(self._record(document, max(hits), before))
                yield document
        save_cuts(self.cuts, rank, cuts)
        if records:
            self.edited.mkdir(parents=True, exist_ok=True)
            lines = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
            replace_file(self.edited / f"lines-{rank:05d}.jsonl", lines)

    def _record(self, document: Document, documents: int, before: int) -> dict:
        return {
            "id": document.id,
            "source": document.metadata["source"],
            "edit": "line_duplicates",
            "measure": "documents",
            "value": documents,
            "threshold": self.settings.min_documents,
            "bytes_before": before,
            "bytes_after": text_bytes(document),
        }


def lines_to_cut(text: str, hashes: list[int | None], often: Container[int]) -> set[int]:
    """Numbers of the lines whose hashes are in `often`, without lines of code, formulas, tables or links."""
    seen = enumerate(zip(masked(text).splitlines(), hashes, strict=True))
    return {number for number, (visible, found) in seen if found in often and "\0" not in visible}
