"""Documents that are too long to be edited."""

from typing import ClassVar

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.thresholds import STRICT, Count


@rule("raw_length", place=-1, on=True)
@dataclass(frozen=True, config=STRICT)
class RawLength:
    """`max_bytes`: maximum length before edits, in UTF-8 bytes. Edits take up to 53 bytes of memory per byte of text
    (measured; docs/bounds.md). `length` bounds what they leave."""

    before_edits: ClassVar[bool] = True
    max_bytes: Count = 20_000_000

    def __call__(self, text: str) -> Drop | None:
        size = len(text.encode()) if 4 * len(text) > self.max_bytes else 0
        return Drop("max_bytes", size, self.max_bytes) if size > self.max_bytes else None
