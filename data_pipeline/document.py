"""The pipeline's document, and the hashes used for sampling.

A document is datatrove's `Document`: `id` (source name, slash, place in the source), `text`, and `metadata` with at
least `source`. Hashes cover only the text, so they do not depend on a document's name or on other documents.
"""

import hashlib

from datatrove.data import Document

__all__ = ["Document", "in_heldout", "text_bytes", "text_hash"]


def text_bytes(document: Document) -> int:
    return len(document.text.encode())


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def in_heldout(text: str, fraction: float) -> bool:
    """Whether a text belongs to the held-out `fraction`: a function of the text, so that equal texts are in the same
    split, whatever other documents there are."""
    return int(text_hash(text)[:16], 16) < fraction * 2**64
