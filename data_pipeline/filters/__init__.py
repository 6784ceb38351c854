"""Rules that keep or drop a document. One file a rule; `RULES` is the order in which they are asked."""

from data_pipeline.filters.base import Drop, Filter
from data_pipeline.filters.garbled import Garbled
from data_pipeline.filters.length import Length
from data_pipeline.filters.lines import Lines
from data_pipeline.filters.repetition import Repetition
from data_pipeline.filters.symbols import Symbols

# Cheap rules first: a document is charged to the first that drops it.
RULES: dict[str, type[Filter]] = {
    "length": Length,
    "garbled": Garbled,
    "symbols": Symbols,
    "lines": Lines,
    "repetition": Repetition,
}

__all__ = ["RULES", "Drop", "Filter", "Garbled", "Length", "Lines", "Repetition", "Symbols"]
