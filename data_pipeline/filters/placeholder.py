"""Pages with placeholder text (lorem ipsum)."""

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.measures import may_have
from data_pipeline.protected import without_protected
from data_pipeline.thresholds import STRICT, Count, Phrases


@rule("placeholder", place=70)
@dataclass(frozen=True, config=STRICT)
class Placeholder:
    """Maximum number of `phrases` (in lower case) outside code; C4 drops pages with any."""

    max_count: Count = 0
    phrases: Phrases = ("lorem ipsum",)

    def __call__(self, text: str) -> Drop | None:
        if not may_have(text, self.phrases) or not self._count(text):
            return None
        count = self._count(without_protected(text))
        return Drop("max_count", count, self.max_count) if count > self.max_count else None

    def _count(self, text: str) -> int:
        lower = text.lower()
        return sum(map(lower.count, self.phrases))
