"""Base of edits: their interface, registration and application."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.protected import outside_protected, protected_parts
from data_pipeline.registry import Register

REGISTER = Register()
edit = REGISTER.add
MOST_PASSES = 8  # two suffice for human text


@dataclass(frozen=True)
class Edit:
    """A change of a text: the measure, its value before, the threshold that it exceeds, and the new text. `extracted`:
    whether the text was a whole HTML page, so that protected parts are found in the new text only."""

    measure: str
    value: float
    threshold: float
    text: str
    extracted: bool = False


class Editor(Protocol):
    """text -> the edit, or None when nothing is to change. Protected parts stay unchanged."""

    def __call__(self, text: str) -> Edit | None: ...


def make_edits(editors: dict[str, Editor], text: str) -> tuple[str, dict[str, Edit]]:
    """The text after all edits, and {name: its first edit}.

    The edits are applied in order, repeatedly, until none changes the text, so a second run changes nothing. A text
    that does not converge, or whose protected parts an edit would change, stays unedited.
    """
    made: dict[str, Edit] = {}
    before, parts = text, None
    for _ in range(MOST_PASSES):
        at_first = text
        for name, editor in editors.items():
            if change := editor(text):
                parts = protected_parts(text) if parts is None else parts
                text = change.text
                made.setdefault(name, change)
                if change.extracted:
                    parts = protected_parts(text)
        if text == at_first:
            return (text, made) if _in_order(parts or [], text) else (before, {})
    return before, {}


def _in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def counted(text: str, change: Callable[[str], tuple[str, int]]) -> tuple[str, int]:
    """(`text` with `change` applied to each piece outside protected parts, sum of the counts that it returns)."""
    counts = []

    def changed(piece: str) -> str:
        piece, count = change(piece)
        counts.append(count)
        return piece

    return outside_protected(text, changed), sum(counts)


def substitute(pattern: re.Pattern, replacement, text: str) -> tuple[str, int]:
    """(`text` with each match of `pattern` outside protected parts replaced, number of matches)."""
    # Most texts have no match, and a search is cheaper than finding protected parts.
    return counted(text, lambda piece: pattern.subn(replacement, piece)) if pattern.search(text) else (text, 0)
