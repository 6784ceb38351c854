"""Baselines for bits per byte: a unigram model, gzip and xz, on the same held-out documents."""

import gzip
import lzma
import math
from collections.abc import Iterable, Sequence

import numpy as np


def unigram_bits_per_byte(
    training: Iterable[np.ndarray], held_out: Sequence[np.ndarray], text_bytes: int, vocab_size: int
) -> float:
    """Bits per byte of held-out documents (ids [n], bos first; bos is not counted) under a unigram model.

    Token probabilities are frequencies in the training documents with add-one smoothing.
    text_bytes: UTF-8 bytes of all held-out documents.
    """
    counts = np.ones(vocab_size)
    for ids in training:
        counts += np.bincount(ids[1:], minlength=vocab_size)
    bits = -np.log2(counts / counts.sum())
    return math.fsum(bits[ids[1:]].sum() for ids in held_out) / text_bytes


def compressor_bits_per_byte(texts: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the concatenated texts."""
    whole = b"".join(texts)
    return {
        "gzip -9": 8 * len(gzip.compress(whole, compresslevel=9)) / len(whole),
        "xz -9": 8 * len(lzma.compress(whole, preset=9)) / len(whole),
    }
