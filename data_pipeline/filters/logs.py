"""Log files."""

import re

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.measures import lines
from data_pipeline.thresholds import STRICT, Positive, Share

LOG_LINE = re.compile(
    r"\s*(?:\[?\d{4}[-/]\d\d[-/]\d\d[T ]\d\d:\d\d|[A-Z][a-z]{2} +\d{1,2} \d\d:\d\d:\d\d|\[? *\d+\.\d{3,}\]|"
    r"\d{1,3}(?:\.\d{1,3}){3} \S+ \S+ \[|\[?\d\d:\d\d:\d\d|\[?(?:DEBUG|INFO|WARN|WARNING|ERROR|FATAL|TRACE|CRITICAL)\b)"
)


@rule("logs", place=40, on=True)
@dataclass(frozen=True, config=STRICT)
class Logs:
    """Maximum share of lines that begin with a time stamp or a log level, in texts of at least `min_lines` lines."""

    max_share: Share = 0.5
    min_lines: Positive = 5

    def __call__(self, text: str) -> Drop | None:
        found = lines(text)
        if len(found) < self.min_lines:
            return None
        half = len(found) // 2
        logs = sum(map(_is_log, found[:half]))
        if logs + len(found) - half <= self.max_share * len(found):  # even if the second half has only log lines
            return None
        share = (logs + sum(map(_is_log, found[half:]))) / len(found)
        return Drop("max_share", share, self.max_share) if share > self.max_share else None


def _is_log(line: str) -> bool:
    return LOG_LINE.match(line) is not None
