"""The same thing over and over."""

from collections import Counter
from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from data_pipeline.filters.base import Drop, rule
from data_pipeline.letters import plain
from data_pipeline.thresholds import STRICT, Count, Positive, Share


@rule("repetition", place=50, on=True)
@dataclass(frozen=True, config=STRICT)
class Repetition:
    """Shares, at most: `max_duplicate_lines` of the characters that lie in lines seen before in the document (lines of
    fewer than `shortest_line` characters do not count: code repeats `else:` and closing brackets by its nature);
    `max_top_words` of the words that are the commonest run of `words` words, and `max_repeated_words` of the words that
    end a run of `run` words seen before, in texts of `min_words` words or more. The last finds whole passages that come
    again where no line does; 1 asks for none."""

    max_duplicate_lines: Share = 0.5
    shortest_line: Count = 12
    max_top_words: Share = 0.2
    words: Positive = 3
    max_repeated_words: Share = 1.0
    run: Positive = 10
    min_words: Count = 60

    def __call__(self, text: str) -> Drop | None:
        share = self._duplicate_lines(text)
        if share > self.max_duplicate_lines:
            return Drop("max_duplicate_lines", share, self.max_duplicate_lines)
        words = text.split()
        share = self._top_words(words)
        if share > self.max_top_words:
            return Drop("max_top_words", share, self.max_top_words)
        share = self._repeated_words(words) if self.max_repeated_words < 1 else 0.0
        return Drop("max_repeated_words", share, self.max_repeated_words) if share > self.max_repeated_words else None

    def _duplicate_lines(self, text: str) -> float:
        size = len if plain(text) == text else _letters
        lines = [line for raw in text.splitlines() if size(line := raw.strip()) >= self.shortest_line]
        total = sum(map(size, lines))
        return 1 - sum(map(size, set(lines))) / total if total else 0.0

    def _top_words(self, words: list[str]) -> float:
        if len(words) < max(self.min_words, self.words):
            return 0.0
        return Counter(_runs(words, self.words)).most_common(1)[0][1] * self.words / len(words)

    def _repeated_words(self, words: list[str]) -> float:
        if len(words) < max(self.min_words, self.run):
            return 0.0
        ends = len(words) - self.run + 1
        return (ends - len(set(_runs(words, self.run)))) / len(words)


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(length)), strict=False)


def _letters(line: str) -> int:
    return len(plain(line))
