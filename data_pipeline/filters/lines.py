"""Data instead of prose: encoded blobs and minified files (long lines), lists of links (only list items)."""

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
    """Maxima over non-empty lines: mean and longest line in characters (prose with a paragraph per line needs higher
    bounds than code); shares of lines that begin with a bullet or end in an ellipsis, as teasers do (Gopher: 0.9 and
    0.3)."""

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
