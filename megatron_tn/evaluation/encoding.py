"""Token ids of a context followed by a continuation; a task scores the continuation."""

import numpy as np
from tokenizers import Tokenizer


def encode_pair(tokenizer: Tokenizer, bos: int, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """(ids int64 [n] of bos, context and continuation; the place of the first one that is scored, at least 1).

    The text is encoded as a whole, as training did. The first scored token is the one that holds the continuation's
    first letter, so that none is lost where a merge crosses the border: such a token is scored with the context's
    letters in it. White space at the end of the context belongs to the continuation, as in lm-evaluation-harness: in
    most vocabularies it begins the next word's token. tokenizer: without a post-processor, which may leave white space
    out of a token's place in the text.
    """
    border = len(context.rstrip())
    encoding = tokenizer.encode(context + continuation, add_special_tokens=False)
    # Ends of tokens in the text do not decrease; a byte of a character has the whole character's place.
    before = sum(end <= border for _, end in encoding.offsets)
    return np.array([bos, *encoding.ids]), 1 + before


def encode_text(tokenizer: Tokenizer, bos: int, text: str) -> np.ndarray:
    """ids int64 [n] of bos and a text, which is not read for special tokens."""
    return np.array([bos, *tokenizer.encode(text, add_special_tokens=False).ids])
