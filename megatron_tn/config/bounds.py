"""The two kinds of checks of settings: bounds of one value, and relations between several settings.

A field is annotated with its bounds: `Annotated[int, Bounds(1)]`. pydantic ignores them: it checks types and raises at
once, whereas values out of bounds are reported together with the violated relations.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Annotated, Any

MOST_INT = 2**63 - 1  # the largest int64
MOST_SEED = 2**64 - 1  # the largest seed of torch.manual_seed


@dataclasses.dataclass(frozen=True)
class Bounds:
    """least <= value <= most. above: least < value. below: value < most. NaN is out of all bounds."""

    least: float
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.least < value if self.above else self.least <= value) and (
            value < self.most if self.below else value <= self.most
        )

    def describe(self, value: float) -> str:
        """The condition that `value`, which is out of bounds, violates: "must be ..."."""
        if self.most == MOST_INT and value > MOST_INT:
            return f"must be at most {MOST_INT}, the largest integer of 64 bits"
        if value == self.most == math.inf:
            return "must be finite"
        if self.most in (math.inf, MOST_INT):
            least = f"must be {'above' if self.above else 'at least'} {self.least}"
            return f"{least}, and finite" if self.below else least
        if self.above:
            return f"must be above {self.least} and {'below' if self.below else 'at most'} {self.most}"
        return f"must be from {self.least} to {'below ' if self.below else ''}{self.most}"


Positive = Annotated[int, Bounds(1, MOST_INT)]
Count = Annotated[int, Bounds(0, MOST_INT)]
Seed = Annotated[int, Bounds(0, MOST_SEED)]
Share = Annotated[float, Bounds(0, 1)]
AboveZero = Annotated[float, Bounds(0, above=True, below=True)]  # and finite
FromZero = Annotated[float, Bounds(0, below=True)]  # and finite
Unlimited = Annotated[float, Bounds(0)]  # infinity included


def out_of_bounds(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name -> one line, for every setting of a (nested) config dataclass that is out of bounds. None is never
    out of bounds."""
    found = {}
    for name, hint in _hints(type(config)).items():
        value, setting = getattr(config, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            found |= out_of_bounds(value, f"{setting}.")
        for bounds in getattr(hint, "__metadata__", ()):
            if isinstance(bounds, Bounds) and value is not None and value not in bounds:
                unset = ", or null where it is not known" if type(None) in typing.get_args(hint.__origin__) else ""
                found[setting] = f"{setting}={value} {bounds.describe(value)}{unset}"
    return found


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


class Relations:
    """A list of checks: functions that yield one line for each violated relation between settings.

    A check declares the settings that it reads, and is skipped if one of them is out of bounds: with heads=0 the check
    of embed_dim % heads would divide by zero.
    """

    def __init__(self) -> None:
        self._checks: list[tuple[tuple[str, ...], Callable[..., Iterable[str]]]] = []

    def reads(self, *settings: str) -> Callable[[Callable[..., Iterable[str]]], Callable[..., Iterable[str]]]:
        """Decorator; `settings` are dotted names."""

        def register(check: Callable[..., Iterable[str]]) -> Callable[..., Iterable[str]]:
            self._checks.append((settings, check))
            return check

        return register

    def broken(self, out: Collection[str], *arguments: Any) -> Iterator[str]:
        """The lines of all violated relations. out: settings out of bounds; arguments: passed to each check."""
        for settings, check in self._checks:
            if not any(setting in out for setting in settings):
                yield from check(*arguments)
