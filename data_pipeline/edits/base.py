"""The protocol of an edit."""

import re
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.protected import outside_protected
from data_pipeline.registry import Register

REGISTER = Register()
edit = REGISTER.add


@dataclass(frozen=True)
class Edit:
    """What was changed: the measure, what it was before, the threshold above which it is edited, and the new text."""

    measure: str
    value: float
    threshold: float
    text: str


class Editor(Protocol):
    """Text -> None when there is nothing to do, or the edit."""

    def __call__(self, text: str) -> Edit | None: ...


def substitute(pattern: re.Pattern, replacement, text: str) -> tuple[str, int]:
    """`pattern` replaced outside protected parts, and how often."""
    count = 0

    def change(piece: str) -> str:
        nonlocal count
        piece, made = pattern.subn(replacement, piece)
        count += made
        return piece

    # Most texts have nothing to replace, and finding protected parts costs more than finding that out.
    return (outside_protected(text, change), count) if pattern.search(text) else (text, 0)
