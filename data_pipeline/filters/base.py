"""What a rule is, and how a file of this folder registers one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.registry import Register

REGISTER = Register()


@dataclass(frozen=True)
class Drop:
    """Why a document goes: the measure, its value, and the threshold that the value crosses."""

    measure: str
    value: float | str
    threshold: float | str


class Filter(Protocol):
    """text -> None to keep the document, or the reason to drop it. A rule with an attribute `languages` is asked of
    documents in those languages alone; one whose class has `before_edits = True`, of the text before any edit."""

    def __call__(self, text: str) -> Drop | None: ...


def rule(name: str, *, place: int, on: bool = False) -> Callable[[type], type]:
    """Class decorator: registers a rule as `rules.NAME` of the settings.

    place: rules are asked in ascending order, cheap ones first; the first that objects is the one recorded. on: whether
    every pipeline has the rule unless it says null; otherwise conf/pipeline/*.yaml turns it on.
    """
    return REGISTER.add(name, place=place, on=on)
