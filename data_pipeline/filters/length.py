"""Too short to teach anything, or too long to be a document."""

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import RULE, Drop


@dataclass(frozen=True, config=RULE)
class Length:
    """Bounds in UTF-8 bytes, both inclusive."""

    min_bytes: int = 100
    max_bytes: int = 10_000_000

    def __call__(self, text: str) -> Drop | None:
        size = len(text.encode())
        if size < self.min_bytes:
            return Drop("min_bytes", size, self.min_bytes)
        if size > self.max_bytes:
            return Drop("max_bytes", size, self.max_bytes)
        return None
