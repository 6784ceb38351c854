"""Data in disguise: encoded blobs and minified files have lines that nobody wrote, lists of links nothing but items."""

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.measures import lines
from data_pipeline.thresholds import STRICT, Amount, Count, Share

BULLETS = ("•", "‣", "●", "▪", "- ", "* ")
ELLIPSES = ("...", "…")


@rule("lines", place=30, on=True)
@dataclass(frozen=True, config=STRICT)
class Lines:
    """Of the lines that are not empty: characters a line, the mean and the longest, at most (prose with a paragraph a
    line needs higher bounds than code); and the shares, at most, that begin with a bullet and that end in an ellipsis,
    as in teasers of pages elsewhere (Gopher has 0.9 and 0.3)."""

    max_mean: Amount = 2_000
    max_line: Count = 50_000
    max_bullets: Share = 1.0
    max_ellipses: Share = 1.0

    def __call__(self, text: str) -> Drop | None:
        found = lines(plain(text)) or [""]
        measures = {
            "max_line": max(map(len, found)),
            "max_mean": sum(map(len, found)) / len(found),
            "max_bullets": sum(line.lstrip().startswith(BULLETS) for line in found) / len(found),
            "max_ellipses": sum(line.rstrip().endswith(ELLIPSES) for line in found) / len(found),
        }
        over = ((name, value) for name, value in measures.items() if value > getattr(self, name))
        return next((Drop(name, value, getattr(self, name)) for name, value in over), None)
