"""The parts of a text that no edit may touch, and that rules about prose do not look at."""

import re
from collections.abc import Callable

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


def outside_protected(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` made to what lies between protected parts."""
    pieces, at = [], 0
    for match in PROTECTED.finditer(text):
        pieces += [change(text[at : match.start()]), match.group()]
        at = match.end()
    return "".join([*pieces, change(text[at:])])
