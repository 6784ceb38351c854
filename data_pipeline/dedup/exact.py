"""Exact duplicates: one copy stays, of the source of highest priority, and the same one in every run."""

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
from data_pipeline.document import text_hash
from data_pipeline.steps.drops import drop_writer


def _text(document: Document) -> str:
    return document.text


def _priority(priorities: dict[str, int], document: Document) -> int:
    return priorities[document.metadata["source"]] + 1  # datatrove counts from 1


def _config(priorities: dict[str, int]) -> ExactDedupConfig:
    return ExactDedupConfig(_text, functools.partial(_priority, priorities), HASH)


def signatures(priorities: dict[str, int], work: Path) -> PipelineStep:
    """Per task: a hash of each document. `priorities`: of each source, the highest stays."""
    return ExactDedupSignature(str(work / "exact" / "signatures"), _config(priorities))


def find(work: Path) -> PipelineStep:
    """In one task: which places hold a hash that another place has too."""
    return ExactFindDedups(str(work / "exact" / "signatures"), str(work / "exact" / "duplicates"), _config({}))


def remove(work: Path, drops: Path) -> PipelineStep:
    """Per task: drops those, recording the hash that they share with the copy that stays."""
    # The folder is listed even when no duplicate was found and nothing wrote to it.
    (work / "exact" / "duplicates").mkdir(parents=True, exist_ok=True)
    return ExactDedupFilter(str(work / "exact" / "duplicates"), _config({}), drop_writer(drops, _reason))


def _reason(document: Document) -> dict:
    value = f"sha256:{text_hash(document.text)}"
    return {"filter": "exact_duplicate", "measure": "copies", "value": value, "threshold": 1}
