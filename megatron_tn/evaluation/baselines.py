"""Bits per byte of the same documents under a unigram model and under gzip and xz, to hold a model's against."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterable, Sequence

import numpy as np


def unigram_bits_per_byte(
    training: Iterable[np.ndarray], held_out: Sequence[np.ndarray], text_bytes: int, vocab_size: int
) -> float:
    """Bits per byte of held-out documents (ids [n], bos first) under independent token probabilities, bos given.

    Probabilities are frequencies in the training documents, with one added to each count so that none is zero.
    text_bytes: UTF-8 bytes of all held-out documents.
    """
    counts = np.ones(vocab_size)
    for ids in training:
        counts += np.bincount(ids[1:], minlength=vocab_size)
    bits = -np.log2(counts / counts.sum())
    return math.fsum(bits[ids[1:]].sum() for ids in held_out) / text_bytes


def compressor_bits_per_byte(texts: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9`, given all texts as one file."""
    whole = b"".join(texts)
    return {
        "gzip -9": 8 * len(gzip.compress(whole, compresslevel=9)) / len(whole),
        "xz -9": 8 * len(lzma.compress(whole, preset=9)) / len(whole),
    }
