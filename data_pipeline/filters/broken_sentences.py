"""Sentences that break off: full stops followed by lower case, as in shuffled words."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.measures import words
from data_pipeline.thresholds import STRICT, Positive, Share

# Only full stops: after "O night!" or "Come!", verse and dialogue continue in lower case. The full stop ends a word of
# three letters or more, possibly with marks after it, or stands alone; the next word is on the same line.
STOP = re.compile(r"\.([\"')\]”’]*)[^\S\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+(?=\S)")  # noqa: RUF001
THREE_LETTERS = re.compile(r"[^\W\d_]{3}")


@rule("broken_sentences", place=110)
@dataclass(frozen=True, config=STRICT)
class BrokenSentences:
    """Maximum share of full stops within a line that a lower-case word follows, in texts of `min_sentences` or more:
    rare in real text (abbreviations), common in shuffled words. Only for text with at least one capitalised word per
    two full stops."""

    max_share: Share = 0.5
    min_sentences: Positive = 4

    def __call__(self, text: str) -> Drop | None:
        text = plain(text)
        following = [text[stop.end()] for stop in STOP.finditer(text) if _ends(text, stop)]
        if len(following) < self.min_sentences:
            return None
        share = sum(map(_is_lower, following)) / len(following)
        if share <= self.max_share or 2 * sum(word[0].isupper() for word in words(text)) < len(following):
            return None
        return Drop("max_share", share, self.max_share)


def _ends(text: str, stop: re.Match) -> bool:
    """Whether a full stop ends a sentence."""
    at = stop.start()
    if THREE_LETTERS.match(text, max(at - 3, 0), at):
        return True
    return not stop[1] and (not at or text[at - 1].isspace())


def _is_lower(letter: str) -> bool:
    """Whether a letter is lower case in a script that capitalises sentences; Georgian does not."""
    return letter.islower() and letter.title() != letter
