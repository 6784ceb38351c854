"""Rules that keep or drop a document. One file a rule; `RULES` is the order in which they are asked."""

from data_pipeline.filters.base import Drop, Filter
from data_pipeline.filters.boilerplate import Boilerplate, Logs
from data_pipeline.filters.garbled import Garbled
from data_pipeline.filters.keyboard import Keyboard
from data_pipeline.filters.language import Language
from data_pipeline.filters.length import Length
from data_pipeline.filters.line_ends import LineEnds
from data_pipeline.filters.lines import Lines
from data_pipeline.filters.repetition import Repetition
from data_pipeline.filters.scrambled import BrokenSentences, WordOrder
from data_pipeline.filters.symbols import Symbols
from data_pipeline.filters.unfinished import CurlyBrackets, Placeholder
from data_pipeline.filters.words import StopWords, Words

# Asked of the text as it came; all others of the text as it was edited.
BEFORE_EDITS = ("garbled",)
# Cheap rules first: a document is charged to the first that drops it.
RULES: dict[str, type[Filter]] = {
    "garbled": Garbled,
    "length": Length,
    "symbols": Symbols,
    "lines": Lines,
    "logs": Logs,
    "repetition": Repetition,
    "boilerplate": Boilerplate,
    "placeholder": Placeholder,
    "curly_brackets": CurlyBrackets,
    "words": Words,
    "keyboard": Keyboard,
    "broken_sentences": BrokenSentences,
    "line_ends": LineEnds,
    "stop_words": StopWords,
    "word_order": WordOrder,
}

__all__ = [
    "BEFORE_EDITS",
    "RULES",
    "Boilerplate",
    "BrokenSentences",
    "CurlyBrackets",
    "Drop",
    "Filter",
    "Garbled",
    "Keyboard",
    "Language",
    "Length",
    "LineEnds",
    "Lines",
    "Logs",
    "Placeholder",
    "Repetition",
    "StopWords",
    "Symbols",
    "WordOrder",
    "Words",
]
