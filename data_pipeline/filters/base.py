"""The protocol of a rule."""

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import AfterValidator, ConfigDict, Field

# A rule is a frozen dataclass of its thresholds, so that conf/pipeline/*.yaml spells them and unknown ones are refused.
RULE = ConfigDict(extra="forbid", allow_inf_nan=False)
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


def _findable(phrases: tuple[str, ...]) -> tuple[str, ...]:
    """A pattern of no phrase, or of an empty one, is found everywhere, and capitals nowhere in lower case."""
    if not phrases or not all(phrase.strip() and phrase == phrase.lower() for phrase in phrases):
        raise ValueError("must be one phrase or more, none of them empty, all in lower case")
    return phrases


Phrases = Annotated[tuple[str, ...], AfterValidator(_findable)]


def ordered(rule: object, low: str, high: str) -> None:
    """Raises ValueError when a rule's bound `low` is above its bound `high`, between which nothing would be kept."""
    least, most = getattr(rule, low), getattr(rule, high)
    if least > most:
        raise ValueError(f"{low}={least} must be at most {high}={most}: nothing would be kept")


@dataclass(frozen=True)
class Drop:
    """Why a document goes: the measure, what it was, and the threshold it crossed."""

    measure: str
    value: float | str
    threshold: float | str


class Filter(Protocol):
    """Text -> None to keep it, or the reason to drop it. A rule that has `languages` is asked of those alone."""

    def __call__(self, text: str) -> Drop | None: ...
