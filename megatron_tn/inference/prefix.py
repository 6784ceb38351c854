"""A document's beginning, processed: the prompt cache of a recurrent model."""

from __future__ import annotations

import hashlib
import json
import operator
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_tn.config import ModelConfig, differences, to_mapping
from megatron_tn.inference.prefill import CHUNK, prefill
from megatron_tn.model.base import DecodingState, Model
from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.fp8_weights import keeps_fp8

NO_DIFFERENCE = {"name": "", "init_std": 0.0}  # settings that do not change what a model computes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
# Model -> other models with equal weights, of those compared so far.
EQUAL: weakref.WeakKeyDictionary[Model, weakref.WeakSet[Model]] = weakref.WeakKeyDictionary()


class Origin(NamedTuple):
    """The model that computed a state, which the state does not keep in memory: its config, its `types`, itself."""

    config: ModelConfig
    types: str
    model: weakref.ref[Model]

    @classmethod
    def of(cls, model: Model) -> Origin:
        return cls(model.config, types(model), weakref.ref(model))

    def difference(self, model: Model) -> str:
        """How another model differs from this one, in words; empty where it is the same, or has the same settings and
        equal weights. Collective over tensor parallelism."""
        theirs, own = self.model(), types(model)
        if (theirs, self.config, self.types) == (model, model.config, own):
            return ""
        if found := kind_difference((to_mapping(self.config), self.types), (to_mapping(model.config), own)):
            return found
        gone = torch.tensor(float(theirs is None), device=next(model.parameters()).device)
        if all_reduce_(gone, model.context.tp).item():  # on any rank: each collects its garbage at a time of its own
            return "its weights are no longer in memory, to be compared; a state in a file goes on with equal weights"
        if model is theirs or model in EQUAL.setdefault(theirs, weakref.WeakSet()):
            return ""
        if (one := fingerprint(theirs)) != (other := fingerprint(model)):
            return f"weights with fingerprint {one}, not {other}"
        EQUAL[theirs].add(model)
        return ""


@dataclass(frozen=True)
class Prefix:
    """state: after all tokens but the last, B = 1; None for a single token. last: that token's id. seen: every id that
    occurs, which repetition penalties fall on. origin: of the state.

    Never written to after it is made, so any number of continuations may begin at it.
    """

    state: DecodingState | None
    last: int
    seen: frozenset[int]
    origin: Origin | None = None

    @classmethod
    def of(cls, model: Model, ids: Sequence[int], before: Prefix | None = None, chunk: int = CHUNK) -> Prefix:
        """`before` and then `ids`. chunk: see `prefill`. Collective over tensor parallelism.

        Raises:
            ValueError: there are no tokens, they are no ids, an id is outside the vocabulary, or another model
                computed `before`.
        """
        ids = as_ids(ids)
        if before is not None:
            before.check_origin(model)
            if not ids:
                return before
            ids = [before.last, *ids]
        if not ids:
            raise ValueError("the prompt has no tokens; begin a document with its bos id")
        seen = frozenset(ids) if before is None else before.seen | frozenset(ids)
        check_ids(seen, model.config.vocab_size)
        state = prefill(model, ids[:-1], None if before is None else before.state, chunk)
        return cls(state, int(ids[-1]), seen, None if state is None else Origin.of(model))

    @property
    def length(self) -> int:
        """Number of tokens."""
        return 1 if self.state is None else self.state.position + 1

    def check_origin(self, model: Model) -> None:
        """Raise ValueError if a model of another config, computing type, type of weights, or with other weights
        computed the state."""
        if self.origin is not None and (found := self.origin.difference(model)):
            raise ValueError(f"the prefix was computed by another model: {found}")


def kind_difference(theirs: tuple[dict[str, Any], str], own: tuple[dict[str, Any], str]) -> str:
    """How a model's (config, `types`) differ from its `own`, in words that name settings; empty where they do not."""
    if changed := differences(theirs[0] | NO_DIFFERENCE, own[0] | NO_DIFFERENCE):
        return ", ".join(changed)
    if theirs[1] == own[1]:
        return ""
    setting = "fp8_weights" if theirs[1].split()[0] == own[1].split()[0] else "precision"
    return f"weights in {theirs[1]}, not {own[1]} (setting {setting})"


def types(model: Model) -> str:
    """The type that the model computes in, and whether its weights are kept in another."""
    computing = str(next(model.parameters()).dtype)
    return f"{computing} and fp8" if keeps_fp8(model.blocks[0]) else computing  # as every block: few parameters to ask


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


def fingerprint(model: Model) -> str:
    """16 hex digits of the weights' values, equal for every tensor-parallel layout. Collective over tensor parallelism.

    SHA-256 of each parameter's name and of the sum of its elements' bit patterns modulo 2^64, which does not depend on
    the order of summation.
    """
    axis, sums = model.context.tp, []
    for parameter in model.parameters():
        bits = parameter.detach().contiguous().view(INTEGERS[parameter.itemsize])
        replica = axis.rank > 0 and parameter.shard_spec.replicated
        sums.append(torch.zeros_like(bits.sum()) if replica else bits.sum())
    total = all_reduce_(torch.stack(sums), axis).tolist()
    names = [name for name, _ in model.named_parameters()]
    return hashlib.sha256(json.dumps([names, total]).encode()).hexdigest()[:16]
