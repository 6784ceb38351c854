"""Exact duplicates: the copy in the source of highest priority stays, the same copy in every run."""

import functools
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)

from data_pipeline.dedup import HASH
from data_pipeline.dedup.stayed import RecordStayed
from data_pipeline.document import text_hash
from data_pipeline.steps.drops import drop_writer


def _text(document: Document) -> str:
    return document.text


def _priority(priorities: dict[str, int], document: Document) -> int:
    return priorities[document.metadata["source"]] + 1  # datatrove counts from 1


def _config(priorities: dict[str, int]) -> ExactDedupConfig:
    return ExactDedupConfig(_text, functools.partial(_priority, priorities), HASH)


def signatures(priorities: dict[str, int], work: Path) -> PipelineStep:
    """Per task: a hash of each document. `priorities`: {source: priority}; the copy of highest priority stays."""
    return ExactDedupSignature(str(work / "exact" / "signatures"), _config(priorities))


def find(work: Path) -> PipelineStep:
    """In one task: places (task, index) of documents whose hash occurs before."""
    return ExactFindDedups(str(work / "exact" / "signatures"), str(work / "exact" / "duplicates"), _config({}))


def remove(work: Path, drops: Path) -> list[PipelineStep]:
    """Per task: drops the duplicates found, recording the hash that they share with the copy that stays, and records
    the copies that stay."""
    # datatrove lists the folder, which does not exist when no duplicate was found.
    (work / "exact" / "duplicates").mkdir(parents=True, exist_ok=True)
    drop = ExactDedupFilter(str(work / "exact" / "duplicates"), _config({}), drop_writer(drops, _reason))
    return [drop, RecordStayed(work / "exact" / "stayed", _stays)]


def _reason(document: Document) -> dict:
    return {"filter": "exact_duplicate", "measure": "copies", "value": _hash(document), "threshold": 1}


def _stays(document: Document) -> str | None:
    # datatrove's filter gives a document that stays the number of its dropped copies.
    return _hash(document) if document.metadata["duplicate_count"] else None


def _hash(document: Document) -> str:
    return f"sha256:{text_hash(document.text)}"
