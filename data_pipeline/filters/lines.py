"""Data in disguise: encoded blobs and minified files have lines that nobody wrote."""

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import RULE, Drop


@dataclass(frozen=True, config=RULE)
class Lines:
    """Characters a line that is not empty: the mean and the longest, at most. Prose with a paragraph a line needs
    higher bounds than code."""

    max_mean: float = 2_000
    max_line: int = 50_000

    def __call__(self, text: str) -> Drop | None:
        lengths = [len(line) for line in text.splitlines() if line.strip()] or [0]
        if max(lengths) > self.max_line:
            return Drop("max_line", max(lengths), self.max_line)
        mean = sum(lengths) / len(lengths)
        return Drop("max_mean", mean, self.max_mean) if mean > self.max_mean else None
