"""Protected parts of a text, which edits leave unchanged and prose rules skip: code, formulas, tables, links.

Three passes find them: blocks of whole lines, then LaTeX over several lines, then inline parts. Each is linear in the
text's length: end markers that may be missing are found by a stack or within a maximum length.
"""

import functools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator

Span = tuple[int, int]  # [start, end) in characters

ENDS = "\n\r\x0c\x85\u2028\u2029"  # line ends that the edit `characters` converts to line feeds
LINE = re.compile(rf"[^{ENDS}]*(?:\r\n|[{ENDS}])|[^{ENDS}]+")
OTHER_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # line ends of str.splitlines other than the line feed
NOT_END = re.compile("[^\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # not a line end of str.splitlines
# Prefix of a line: quotation marks of Markdown, invisible characters.
QUOTE = re.compile("(?:[\ufeff\u200b\u2060\u00ad]| {0,3}>[ \t]?)*")
QUOTED = re.compile("[\ufeff\u200b\u2060\u00ad]| {0,3}>")
ITEM = r"[ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*"  # list markers, after which a fence may begin
FENCE = re.compile(rf"{ITEM}(?P<mark>`{{3,}}(?=[^`]*$)|~{{3,}})")
INDENTED = re.compile(r"(?: {4}| {0,3}\t)[ \t]*\S")
ROW = re.compile(r"[ \t]*(?:\|.*\||\+(?:[-=]+\+)+)[ \t]*$")
DELIMITERS = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)+\|?[ \t]*$")
BORDER = re.compile(r"[ \t]*={2,}(?:[ \t]+={2,})+[ \t]*$")  # border of a reStructuredText simple table
RULER = re.compile(r"[ \t]*(?P<mark>[-=*_~^+#])(?:[ \t]*(?P=mark)){2,}[ \t]*$")
DEFINITION = re.compile(r" {0,3}\[[^\]\n]{1,500}\]:[ \t]*\S")  # [name]: address
BEGINS = re.compile(r"[ \t]*[`~|+=*_^#\[0-9-]")  # FENCE, ROW, BORDER, RULER, DEFINITION
LONGEST_TABLE = 200  # lines between the borders of a simple table

LATEX = re.compile(r"\\begin\{([A-Za-z]+\*?)\}|\\end\{([A-Za-z]+\*?)\}|(?<!\\)\\[\[\]()]|\$\$|\n[ \t]*\r?\n")
CLOSING = {"\\]": "\\[", "\\)": "\\("}
PROSE_ENVIRONMENTS = ("document",)

# A line end within a paragraph.
WRAP = r"\n(?![ \t]*\r?\n)"
INLINE = re.compile(
    rf"(?<!`)(?P<ticks>`+)(?!`)(?:[^\n]|{WRAP}){{1,1000}}?(?<!`)(?P=ticks)(?!`)"
    rf"|(?<![\\$])\$(?![\s$])(?:[^$\n]|{WRAP}){{1,300}}?(?<![\s\\])\$(?![\d$])"
    r"|\\verb\*?(?P<bar>[^\sA-Za-z*])[^\n]{0,300}?(?P=bar)"
    r"|\\[A-Za-z]+\*?(?:\[[^\]\n]{0,300}\])?(?:\{(?:[^{}]|\{[^{}]{0,500}\}){0,1000}\})+"
    rf"|\[(?:[^\[\]\n]|{WRAP}|\[[^\[\]\n]{{0,500}}\](?:\([^()\s]{{0,2000}}\))?){{0,1000}}\]"
    r"\([ \t]*(?:<[^<>\n]{0,2000}>|(?:[^()\s]|\([^()\s]{0,500}\)){0,2000})"
    r"(?:\s+(?:\"[^\"\n]{0,500}\"|'[^'\n]{0,500}'))?[ \t]*\)"
)
INLINE_MARK = re.compile(r"[`$\\]|\]\(")


def protected_parts(text: str) -> list[str]:
    return [text[start:end] for start, end in spans(text)]


def outside_protected(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to each piece between protected parts."""
    pieces, at = [], 0
    for start, end in spans(text):
        if at < start:
            pieces.append(change(text[at:start]))
        pieces.append(text[start:end])
        at = end
    if at < len(text):
        pieces.append(change(text[at:]))
    return "".join(pieces)


def without_protected(text: str) -> str:
    """`text` with a space in place of each protected part."""
    return _replaced(text, lambda part: " ")


def masked(text: str) -> str:
    """`text` with the characters of protected parts as NUL, except line ends."""
    return _replaced(text, lambda part: NOT_END.sub("\0", part))


def _replaced(text: str, change: Callable[[str], str]) -> str:
    pieces, at = [], 0
    for start, end in spans(text):
        pieces += [text[at:start], change(text[start:end])]
        at = end
    return "".join([*pieces, text[at:]])


@functools.lru_cache(maxsize=1)  # several edits process one text
def spans(text: str) -> tuple[Span, ...]:
    """The protected parts of a text, sorted and disjoint."""
    found = _union(list(_blocks(text)))
    if "\\" in text or "$$" in text:
        found = _union(found + list(_latex(text, found)))
    if INLINE_MARK.search(text):
        found = _union(found + [span for gap in _gaps(text, found) for span in _inline(text, *gap)])
    return tuple(found)


def _union(found: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(found):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _gaps(text: str, found: list[Span]) -> Iterator[Span]:
    at = 0
    for start, end in [*found, (len(text), len(text))]:
        if at < start:
            yield at, start
        at = end


def _inline(text: str, start: int, end: int) -> Iterator[Span]:
    """Inline code, formulas, LaTeX commands with arguments, and links in text[start:end], which is between blocks."""
    for match in INLINE.finditer(text, start, end):
        yield match.span()


def _latex(text: str, blocks: list[Span]) -> Iterator[Span]:
    """LaTeX environments, outermost first, and displayed formulas without an empty line."""
    starts = [start for start, _ in blocks]
    environments: list[tuple[str, int]] = []
    formula: tuple[str, int] | None = None
    for token in LATEX.finditer(text):
        place = bisect_right(starts, token.start()) - 1
        if place >= 0 and token.start() < blocks[place][1]:
            continue
        begin, end, mark = token[1], token[2], token[0]
        if begin and begin not in PROSE_ENVIRONMENTS:
            environments.append((begin, token.start()))
        elif end:
            names = [name for name, _ in environments[-20:]]  # at most 20 levels of unclosed environments
            if end in names:
                depth = len(names) - 1 - names[::-1].index(end)
                start = environments[len(environments) - len(names) + depth][1]
                del environments[len(environments) - len(names) + depth :]
                yield start, token.end()
        elif mark[0] == "\n":
            formula = None
        elif formula and formula[0] == CLOSING.get(mark, mark):
            yield formula[1], token.end()
            formula = None
        elif not formula and mark not in CLOSING and not begin:
            formula = (mark, token.start())


def _blocks(text: str) -> Iterator[Span]:
    """Blocks of whole lines: fenced and indented code, tables, rulers, link definitions."""
    lines = text.splitlines(keepends=True) if not any(end in text for end in OTHER_ENDS) else LINE.findall(text)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    bodies = [
        line[QUOTE.match(line).end() :].rstrip(ENDS) if QUOTED.match(line) else line.rstrip(ENDS) for line in lines
    ]
    at, after_blank = 0, True
    while at < len(lines):
        end = _block(bodies, at, after_blank)
        first = at
        if end < 0:  # _block found a table whose heading is the line before `at`, and returned minus its end
            first, end = at - 1, -end
        if end > at:
            yield offsets[first], offsets[end]
            after_blank, at = True, end
        else:
            after_blank = not bodies[at].strip() or bodies[at].lstrip().startswith("#")
            at += 1


def _block(lines: list[str], at: int, after_blank: bool) -> int:
    """The line after the block that begins with line `at`; `at` without a block; negative for a table whose heading is
    the previous line."""
    line = lines[at]
    begins = BEGINS.match(line) or "|" in line
    if begins and (fence := FENCE.match(line)) and not _is_underline(lines, at):
        return _fence_end(lines, at, fence["mark"])
    if after_blank and INDENTED.match(line):
        return _indented_end(lines, at)
    if not begins:
        return at
    if ROW.match(line):
        return at + 1
    if "|" in line and at and "|" in lines[at - 1] and DELIMITERS.match(line):
        end = at + 1
        while end < len(lines) and "|" in lines[end]:
            end += 1
        return -end
    if line.lstrip()[:2] == "==" and BORDER.match(line):
        return _simple_table_end(lines, at)
    return at + 1 if RULER.match(line) or DEFINITION.match(line) else at


def _is_underline(lines: list[str], at: int) -> bool:
    """Whether a line of tildes or backticks underlines a reStructuredText title, and is not a code fence."""
    mark, title = lines[at].strip(), lines[at - 1].strip() if at else ""
    return len(set(mark)) == 1 and 0 < len(title) <= len(mark) and (at < 2 or not lines[at - 2].strip())


def _fence_end(lines: list[str], at: int, mark: str) -> int:
    """The line after the closing fence, a line of at least as many marks; without one, the end of the text."""
    closing = re.compile(rf"[ \t]*{re.escape(mark)}{re.escape(mark[0])}*[ \t]*$")
    return next((end + 1 for end in range(at + 1, len(lines)) if closing.match(lines[end])), len(lines))


def _indented_end(lines: list[str], at: int) -> int:
    """The line after the last indented line; empty lines between are included."""
    end = at + 1
    for place in range(at + 1, len(lines)):
        if INDENTED.match(lines[place]):
            end = place + 1
        elif lines[place].strip():
            break
    return end


def _simple_table_end(lines: list[str], at: int) -> int:
    """The line after the closing border, which an empty line follows; without one, `at` + 1."""
    for place in range(at + 1, min(at + LONGEST_TABLE, len(lines))):
        closed = place + 1 == len(lines) or not lines[place + 1].strip()
        if closed and BORDER.match(lines[place]):
            return place + 1
    return at + 1
