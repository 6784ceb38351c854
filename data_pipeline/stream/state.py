"""The stream's state in a checkpoint: next sample, and samples to replace by padding."""

import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.errors import InputError


class Ledger:
    """A set of global sample indices, kept as sorted, disjoint half-open ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()):
        self._ranges: list[tuple[int, int]] = []
        for first, stop in ranges:
            self.add(first, stop)

    def add(self, first: int, stop: int) -> None:
        """Adds the samples in [first, stop); raises InputError for an empty or negative range."""
        if not 0 <= first < stop:
            raise InputError(f"skipped range [{first}, {stop}): needs 0 <= first < stop")
        touching = [r for r in self._ranges if r[0] <= stop and first <= r[1]]
        apart = [r for r in self._ranges if r not in touching]
        merged = (min([first, *(r[0] for r in touching)]), max([stop, *(r[1] for r in touching)]))
        self._ranges = sorted([*apart, merged])

    def __contains__(self, index: int) -> bool:
        place = bisect_right(self._ranges, index, key=lambda r: r[0])
        return place > 0 and index < self._ranges[place - 1][1]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return tuple(self._ranges)


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class StreamState:
    """The stream's complete state, equal on every rank and for every parallel layout.

    `next_sample`: global index of the first sample not yet trained on. `skipped`: half-open ranges of global sample
    indices replaced by padding: damaged, or skipped on purpose.
    """

    stream_hash: str
    seed: int
    next_sample: int
    skipped: tuple[tuple[int, int], ...] = ()

    def to_json(self) -> str:
        return json.dumps(STATE.dump_python(self, mode="json"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "StreamState":
        """Raises InputError naming the field that is absent or wrong."""
        try:
            state = STATE.validate_json(text)
            Ledger(state.skipped)
        except ValidationError as error:
            raise InputError(
                *(f"stream state: {'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors())
            ) from None
        return state

    @classmethod
    def merge(cls, states: "Iterable[StreamState]") -> "StreamState":
        """The union of data-parallel ranks' states, with all ranks' damaged samples. Raises InputError when their next
        samples or streams differ."""
        states = list(states)
        if len({(s.stream_hash, s.seed, s.next_sample) for s in states}) != 1:
            raise InputError(f"stream states of {len(states)} ranks differ in more than what they skipped: {states}")
        ledger = Ledger(r for state in states for r in state.skipped)
        return cls(states[0].stream_hash, states[0].seed, states[0].next_sample, ledger.ranges)


STATE = TypeAdapter(StreamState)


@dataclass(frozen=True)
class Damage:
    """A sample that could not be read, and the reason."""

    index: int
    reason: str
