"""Records of dropped documents."""

from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.document import text_bytes

EXCERPT = 300  # characters of a dropped document's text in its record


def drop_writer(folder: Path, reason) -> JsonlWriter:
    """Writer of dropped documents to folder/RANK.jsonl: id, source, bytes, `reason(document)` (filter, measure, value,
    threshold), and the beginning of the text."""

    def record(_, document: Document) -> dict:
        identity = {"id": document.id, "source": document.metadata["source"], "bytes": text_bytes(document)}
        return {**identity, **reason(document), "excerpt": document.text[:EXCERPT]}

    return JsonlWriter(str(folder), output_filename="${rank}.jsonl", compression=None, adapter=record)


def rule_drop(document: Document) -> dict:
    return document.metadata["drop"]
