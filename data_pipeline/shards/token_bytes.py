"""How many bytes of text each entry of a tokenizer stands for."""

import json

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.tokenizer import BYTE


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes of each entry, int64 [V]; 0 for special entries and unused ids.

    Entries are spelled in characters of the text; or, with a ByteLevel decoder, in one character a byte; with
    ByteFallback, <0x0A> is one byte; with Metaspace, or a Replace of it, U+2581 is a space.
    """
    vocabulary = tokenizer.get_vocab()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    found = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
    for entry, place in vocabulary.items():
        if entry in special:
            continue
        if "ByteLevel" in kinds:
            found[place] = len(entry)
        elif "ByteFallback" in kinds and BYTE.fullmatch(entry):
            found[place] = 1
        else:
            spelled = entry.replace("\u2581", " ") if kinds & {"Metaspace", "Replace"} else entry
            found[place] = len(spelled.encode())
    return found
