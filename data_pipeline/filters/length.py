"""Documents that are too short or too long."""

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.thresholds import STRICT, Count, ordered


@rule("length", place=10, on=True)
@dataclass(frozen=True, config=STRICT)
class Length:
    """Bounds of a document's length in UTF-8 bytes, both inclusive."""

    min_bytes: Count = 100
    max_bytes: Count = 10_000_000

    def __post_init__(self):
        ordered(self, "min_bytes", "max_bytes")

    def __call__(self, text: str) -> Drop | None:
        size = len(text.encode())
        if size < self.min_bytes:
            return Drop("min_bytes", size, self.min_bytes)
        if size > self.max_bytes:
            return Drop("max_bytes", size, self.max_bytes)
        return None
