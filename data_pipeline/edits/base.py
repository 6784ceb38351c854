"""The protocol of an edit, and the parts of a text that no edit may touch."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# Code and formulas mean what they say to the character: fenced and inline code, code indented below an empty line,
# LaTeX environments and formulas, Markdown links, rules and table rows. The longest constructs stand first. Each has a
# greatest length: looking for ends that never come must not take the square of a hostile text's length.
PROTECTED = re.compile(
    r"(?P<fence>^(?P<mark>`{3,20}|~{3,20})[^\n]*\n.*?(?:^(?P=mark)[^\n]*$|\Z))"
    r"|(?:(?<=\n\n)|\A)(?:(?: {4}|\t)[^\n]*(?:\n|\Z))+"
    r"|\\begin\{(?P<name>[A-Za-z]+\*?)\}.{0,5000}?\\end\{(?P=name)\}"
    r"|\$\$.{1,2000}?\$\$|\\\[.{1,2000}?\\\]|\\\(.{1,2000}?\\\)"
    r"|\$(?! )[^$\n]{1,300}?(?<! )\$"
    r"|(?<!`)(?P<ticks>`{1,3})(?!`)[^\n]{1,500}?(?<!`)(?P=ticks)(?!`)"
    r"|\[[^\[\]\n]{0,1000}\]\([^()\s]{0,2000}\)"
    r"|^[ \t]*\|[^\n]*\|[ \t]*$"
    r"|^[ \t]*(?P<rule>[-=*_])(?:[ \t]*(?P=rule)){2,}[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


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


def outside_protected(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` made to what lies between protected parts."""
    pieces, at = [], 0
    for match in PROTECTED.finditer(text):
        pieces += [change(text[at : match.start()]), match.group()]
        at = match.end()
    return "".join([*pieces, change(text[at:])])


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
