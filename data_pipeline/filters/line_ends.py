"""Lists of titles, names and menu entries: lines without end punctuation."""

import itertools

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.filters.lines import BULLETS
from data_pipeline.letters import plain
from data_pipeline.measures import lines
from data_pipeline.thresholds import STRICT, Positive, Share


@rule("line_ends", place=120)
@dataclass(frozen=True, config=STRICT)
class LineEnds:
    """Minimum share of lines that end in any punctuation mark, in texts of at least `min_lines` lines in `languages`
    (not Thai, for example, which has no full stop). List items do not count, nor lines before one that begins in lower
    case.

    C4 removes every line without a full stop, including headings, verse and tables; FineWeb drops pages with a share
    below 0.12."""

    min_share: Share = 0.12
    min_lines: Positive = 10
    languages: tuple[str, ...] = ("en", "zh")

    def __call__(self, text: str) -> Drop | None:
        found = [line.strip() for line in lines(plain(text))]
        ends = [
            line[-1]
            for line, following in itertools.pairwise([*found, ""])
            if not (following[:1].islower() or line.startswith(BULLETS))
        ]
        if len(ends) < self.min_lines:
            return None
        share = sum(not end.isalnum() for end in ends) / len(ends)
        return Drop("min_share", share, self.min_share) if share < self.min_share else None
