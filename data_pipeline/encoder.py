"""Text to ids, with a cache of piece -> ids, so that each piece (pre-token) is merged once.

Most of the tokenizer's time is spent on splitting text into pieces by Oniguruma patterns with Unicode classes. In
ASCII text, Python's patterns find the same pieces in a tenth of the time.
"""

import json
import re

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.tokenizer import PIECES

# The alternatives of tokenizer.PIECES, with ASCII letters and digits.
ASCII_PIECES = re.compile(
    r"[ _]?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s*\n[ \t]*|[^\S\n]+(?=[^\S\n]\S)|\s+", re.ASCII
)
MOST_PIECES = 1 << 19  # most pieces in the cache


class Encoder:
    """Same ids as `tokenizer.encode(text, add_special_tokens=False)`, for a tokenizer from `tokenizer.load`."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.known = _Known(tokenizer) if _has_our_pieces(tokenizer) else None

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, uint32 [n]."""
        if self.known is None or not text.isascii():
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
        if len(self.known) > MOST_PIECES:
            self.known.clear()
        return np.frombuffer(b"".join(map(self.known.__getitem__, ASCII_PIECES.findall(text))), np.uint32)


class _Known(dict):
    """{piece: its ids, as the bytes of uint32 [n]}."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.model = tokenizer.model

    def __missing__(self, piece: str) -> bytes:
        self[piece] = ids = np.array([token.id for token in self.model.tokenize(piece)], np.uint32).tobytes()
        return ids


def _has_our_pieces(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer splits text by PIECES and encodes each: no normalisation, no added tokens."""
    settings = json.loads(tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    added = all(token["special"] for token in settings["added_tokens"]) and tokenizer.encode_special_tokens
    model = settings["model"]["type"] == "BPE" and not settings["model"]["dropout"]
    return settings["normalizer"] is None and settings["pre_tokenizer"] == split and added and model
