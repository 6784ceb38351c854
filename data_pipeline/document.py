"""What a document is in the pipeline, and the hashes that decide its fate.

A document is datatrove's `Document`: `id` (source name, slash, place in the source), `text`, and `metadata` with at
least `source`. Everything decided by hash uses the text alone, so that neither its name nor its neighbours matter.
"""

import hashlib

from datatrove.data import Document

__all__ = ["Document", "in_heldout", "text_bytes", "text_hash"]


def text_bytes(document: Document) -> int:
    """UTF-8 bytes of a document's text."""
    return len(document.text.encode())


def text_hash(text: str) -> str:
    """sha256 of a text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def in_heldout(text: str, fraction: float) -> bool:
    """Whether a text belongs to the held-out `fraction`: a function of the text, so that equal texts share a side, and
    a document keeps its side when others come or go."""
    return int(text_hash(text)[:16], 16) < fraction * 2**64
