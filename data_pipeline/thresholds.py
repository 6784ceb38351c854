"""Types of thresholds of rules and edits, which are frozen dataclasses of thresholds."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

# Unknown thresholds in conf/pipeline/*.yaml are refused, and so are NaN and infinity.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


def _findable(phrases: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses empty lists and phrases, which match everywhere, and capitals, which lower-case text does not contain."""
    if not phrases or not all(phrase.strip() and phrase == phrase.lower() for phrase in phrases):
        raise ValueError("must be one phrase or more, none of them empty, all in lower case")
    return phrases


Phrases = Annotated[tuple[str, ...], AfterValidator(_findable)]


def ordered(thresholds: object, low: str, high: str) -> None:
    """Raises ValueError when field `low` exceeds field `high`: no text would pass both."""
    least, most = getattr(thresholds, low), getattr(thresholds, high)
    if least > most:
        raise ValueError(f"{low}={least} must be at most {high}={most}: nothing would be kept")
