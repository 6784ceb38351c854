"""Base of rules: their interface and registration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.registry import Register

REGISTER = Register()


@dataclass(frozen=True)
class Drop:
    """Reason to drop a document: the measure, its value, and the threshold that the value crosses."""

    measure: str
    value: float | str
    threshold: float | str


class Filter(Protocol):
    """text -> None to keep the document, or the reason to drop it. A rule with an attribute `languages` is applied only
    to documents in those languages; one with `before_edits = True`, to the text before any edit."""

    def __call__(self, text: str) -> Drop | None: ...


def rule(name: str, *, place: int, on: bool = False) -> Callable[[type], type]:
    """Class decorator: registers a rule as `rules.NAME` of the settings.

    place: rules are applied in ascending order, cheap ones first; the first that drops a document is recorded. on:
    whether the rule is on by default (null turns it off); otherwise conf/pipeline/*.yaml turns it on.
    """
    return REGISTER.add(name, place=place, on=on)
