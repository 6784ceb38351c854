"""A document's beginning, processed: the prompt cache of a recurrent model."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_tn.inference.prefill import CHUNK, prefill
from megatron_tn.model.base import DecodingState, Model


@dataclass(frozen=True)
class Prefix:
    """state: after all tokens but the last, B = 1; None for a single token. last: that token's id. seen: every id that
    occurs, which repetition penalties fall on.

    Never written to after it is made, so any number of continuations may begin at it.
    """

    state: DecodingState | None
    last: int
    seen: frozenset[int]

    @classmethod
    def of(cls, model: Model, ids: Sequence[int], before: Prefix | None = None, chunk: int = CHUNK) -> Prefix:
        """`before` and then `ids`. chunk: see `prefill`. Collective over tensor parallelism.

        Raises:
            ValueError: there are no tokens, they are no ids, or an id outside the vocabulary.
        """
        ids = as_ids(ids)
        if before is not None:
            if not ids:
                return before
            ids = [before.last, *ids]
        if not ids:
            raise ValueError("the prompt has no tokens; begin a document with its bos id")
        seen = frozenset(ids) if before is None else before.seen | frozenset(ids)
        check_ids(seen, model.config.vocab_size)
        return cls(prefill(model, ids[:-1], None if before is None else before.state, chunk), int(ids[-1]), seen)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return 1 if self.state is None else self.state.position + 1


def as_ids(ids: Sequence[int]) -> list[int]:
    """A sequence of ids, a tensor [N] or an array as a list. Raises ValueError for what holds something else."""
    try:
        return [operator.index(each) for each in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise ValueError(f"a prompt is a list of ids, not {ids!r:.60}") from None


def check_ids(ids: Collection[int], vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    for index in (min(ids), max(ids)) if ids else ():
        if not 0 <= index < vocab_size:
            raise ValueError(f"the prompt holds id {index}, but the vocabulary has {vocab_size} entries")
