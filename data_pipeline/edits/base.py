"""What an edit is, how a file of this folder registers one, and how all of them are made."""

import re
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.protected import outside_protected, protected_parts
from data_pipeline.registry import Register

REGISTER = Register()
edit = REGISTER.add
MOST_PASSES = 8  # two are enough for any text that people wrote


@dataclass(frozen=True)
class Edit:
    """What was changed: the measure, its value before, the threshold above which it is edited, and the new text.
    `extracted`: whether the text was markup as a whole, so that its protected parts are those of the new text."""

    measure: str
    value: float
    threshold: float
    text: str
    extracted: bool = False


class Editor(Protocol):
    """text -> None when there is nothing to do, or the edit. Protected parts stay to the byte."""

    def __call__(self, text: str) -> Edit | None: ...


def make_edits(editors: dict[str, Editor], text: str) -> tuple[str, dict[str, Edit]]:
    """The text after all edits, and {name: the edit as it was made first}.

    The edits are made in their order until none changes anything, so that a second run changes nothing. A text that
    does not settle, or in which an edit would break up a protected part, stays as it was.
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
    """Whether `text` has all parts, one after the other."""
    at = 0
    for part in parts:
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return True


def substitute(pattern: re.Pattern, replacement, text: str) -> tuple[str, int]:
    """`text` with each match of `pattern` outside protected parts replaced, and how many there were."""
    count = 0

    def change(piece: str) -> str:
        nonlocal count
        piece, made = pattern.subn(replacement, piece)
        count += made
        return piece

    # Most texts have nothing to replace, and finding protected parts costs more than finding that out.
    return (outside_protected(text, change), count) if pattern.search(text) else (text, 0)
