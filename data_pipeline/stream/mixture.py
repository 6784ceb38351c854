"""The mixture of sources, by epochs or by weights, and the resulting groups of shards."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.order import sequences_per_epoch

Share = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]  # strict: true is no 1.0


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Mixture:
    """Exactly one of `epochs` and `weights`, {source or category: number}; 0 leaves a source out.

    `epochs`: repetitions of a source in an epoch of training (0.44: 44 % of it); other sources have the manifest's
    epochs. `weights`: shares of the tokens of an epoch that is as long as the corpus; every source must be named.
    """

    epochs: dict[str, Share] = Field(default_factory=dict)
    weights: dict[str, Share] = Field(default_factory=dict)

    def __post_init__(self):
        if bool(self.epochs) == bool(self.weights):
            raise ValueError("a mixture has either epochs or weights")

    @classmethod
    def parse(cls, data: dict) -> "Mixture":
        """A mixture from plain data; raises InputError naming every invalid entry."""
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            found = [(".".join(["mixture", *map(str, e["loc"])]), e["input"], e["msg"]) for e in error.errors()]
            raise InputError(
                *(f"{name}={value!r}: {why.removeprefix('Value error, ')}" for name, value, why in found)
            ) from None


@dataclass(frozen=True)
class Group:
    """Shards that are packed together. `shards`: their indices in the manifest, int64 [n]; `tokens`: kept tokens of
    each, int64 [n]; `samples`: the group's sequences in an epoch of the mixture. `key`: seeds the group's random order;
    empty for the only group of a stream."""

    key: tuple[str, ...]
    shards: np.ndarray
    tokens: np.ndarray
    samples: int


def make_groups(manifest: Manifest, tokens: np.ndarray, mixture: Mixture | None, sequence_length: int) -> list[Group]:
    """The groups of a stream; `tokens` [shards]: kept tokens per shard. Without a mixture the manifest's epochs are
    used; if all are equal, all shards form one group. Raises InputError naming a source that does not exist, is named
    twice, is missing, or has no kept documents."""
    sources = np.array([shard.source for shard in manifest.shards])
    epochs = {name: info.epochs for name, info in manifest.sources.items()}
    if mixture is None and len(set(epochs.values())) == 1:
        return [Group((), np.arange(len(tokens)), tokens, sequences_per_epoch(int(tokens.sum()), sequence_length))]
    names = _members(manifest, (mixture.weights or mixture.epochs) if mixture else {})
    named = {source for members in names.values() for source in members}
    rest = sorted(set(manifest.sources) - named)
    if mixture and mixture.weights and rest:
        raise InputError(f"mixture.weights: no weight for {', '.join(rest)}; 0 leaves a source out")
    shares = dict(mixture.weights or mixture.epochs) if mixture else {}
    for source in rest:
        names[source], shares[source] = [source], epochs[source]
    if not any(shares.values()):
        raise InputError("mixture: every source is left out: give one a number above 0")
    by_weight = bool(mixture and mixture.weights)
    whole = sequences_per_epoch(int(tokens.sum()), sequence_length) / sum(shares.values()) if by_weight else 0.0
    groups = []
    for name in sorted(names):
        if shares[name] == 0:
            continue
        shards = np.flatnonzero(np.isin(sources, names[name]))
        if tokens[shards].sum() < 2:
            raise InputError(f"mixture: fewer than 2 tokens are kept of {name}; leave it out with 0")
        unit = whole if by_weight else sequences_per_epoch(int(tokens[shards].sum()), sequence_length)
        groups.append(Group((name,), shards, tokens[shards], max(1, round(shares[name] * unit))))
    return groups


def _members(manifest: Manifest, asked: dict[str, float]) -> dict[str, list[str]]:
    """{name in the mixture: its sources}; a name is a source or a category."""
    members, problems, taken = {}, [], {}
    for name in asked:
        found = [name] if name in manifest.sources else []
        found = found or [source for source, info in manifest.sources.items() if info.category == name != ""]
        if not found:
            known = sorted({*manifest.sources, *(info.category for info in manifest.sources.values())} - {""})
            problems.append(f"mixture: no source or category {name!r}; there are {', '.join(known)}")
        for source in found:
            if source in taken:
                problems.append(f"mixture: source {source!r} is named by {taken[source]!r} and by {name!r}")
            taken[source] = name
        members[name] = found
    if problems:
        raise InputError(*problems)
    return members
