"""The protocol of a rule."""

from dataclasses import dataclass
from typing import Protocol

from pydantic import ConfigDict

# A rule is a frozen dataclass of its thresholds, so that conf/pipeline/*.yaml spells them and unknown ones are refused.
RULE = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Drop:
    """Why a document goes: the measure, what it was, and the threshold it crossed."""

    measure: str
    value: float | str
    threshold: float | str


class Filter(Protocol):
    """Text -> None to keep it, or the reason to drop it. A rule that has `languages` is asked of those alone."""

    def __call__(self, text: str) -> Drop | None: ...
