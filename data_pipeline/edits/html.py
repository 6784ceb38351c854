"""Removes HTML left in text: tags, comments and entities."""

import html
import re
from html.entities import html5

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, counted, edit
from data_pipeline.edits.characters import standard_characters
from data_pipeline.pages.client import EXTRACTOR, Refused
from data_pipeline.protected import outside_protected
from data_pipeline.thresholds import STRICT, Count

MOST_BYTES, SECONDS = 100_000_000, 60  # limits of a page's extraction; beyond them it leaves no text
# Tag names of HTML only, so that `<stdin>`, `List<int>` and `<3` are not taken for tags; without the names that manuals
# use for what the reader fills in (`cp <source> <dir>`): base, data, dir, map, object, output, param, path, time, var.
NAMES = (
    "a|abbr|acronym|applet|article|aside|audio|b|basefont|bdi|bdo|big|blockquote|body|br|button|canvas|caption|center|"
    "cite|code|col|colgroup|datalist|dd|del|details|dfn|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|"
    "frameset|h[1-6]|head|header|hgroup|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|mark|marquee|meta|"
    "nav|nobr|noframes|noscript|ol|optgroup|option|p|picture|pre|rb|rp|rt|rtc|ruby|samp|script|section|select|small|"
    "span|strike|strong|style|sub|summary|sup|svg|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|video|wbr"
)
# An attribute must have a value, except for HTML's boolean attributes: in `a <b and c> d` there is no tag.
ATTRIBUTES = (
    r"""(?:\s+(?:[a-z@:_][\w:.@-]*\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s<>"']+)"""
    r"|(?:allowfullscreen|async|autofocus|autoplay|checked|compact|controls|default|defer|disabled|hidden|ismap|itemscope|"
    r"loop|multiple|muted|nohref|noshade|novalidate|nowrap|open|playsinline|readonly|required|reversed|selected)(?![\w:=-])"
    r"))*\s*/?>"
)
TAGS = re.compile(rf"</?(?:{NAMES}){ATTRIBUTES}|<!doctype\s[^<>]{{0,300}}>", re.IGNORECASE)
BREAKS = re.compile(rf"(?:<[bh]r{ATTRIBUTES}|</(?:p|div|li|tr|h[1-6]|blockquote)\s*>)[ \t]*\n?", re.IGNORECASE)
HIDDEN = re.compile(r"<(script|style)\b|<(!--)", re.IGNORECASE)  # invisible up to the end tag
ENDS = {
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
    "!--": re.compile("-->"),
}
# An entity, also with its ampersand escaped, such as `&amp;lt;`.
ENTITIES = re.compile(r"&(?:(?:amp|#38|#x26);)*(?P<name>[a-z][a-z0-9]{1,31}|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)
LESS, GREATER = "\ufdd0", "\ufdd1"  # stand for a `<` and a `>` decoded from entities; noncharacters, absent from text
BEGINNING = r"<(?:!doctype\s+html|html|body)\b[^<>]*>"
PAGE = re.compile(rf"\s*(?:(?:<\?xml[^<>]*>|<!--.*?-->)\s*)*{BEGINNING}", re.IGNORECASE | re.DOTALL)
MARKUP = re.compile("|".join((TAGS.pattern, BREAKS.pattern, HIDDEN.pattern, BEGINNING)), re.IGNORECASE)
CODE = re.compile(r"(?:[ \t]*\n)*(?: {4}| {0,3}\t)")  # an indented code block at the beginning of a text


@edit("html")
@dataclass(frozen=True, config=STRICT)
class Html:
    """Removes HTML if there are more than `max_count` tags and entities. From a whole page, the text is extracted as by
    the html reader; in other texts, tags are removed and entities decoded, with characters standardised as by the edit
    `characters`. `&lt;b&gt;` stays: it shows a tag."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if PAGE.match(text) and not CODE.match(text):
            tags = len(TAGS.findall(text))
            return Edit("html_tags", tags, self.max_count, _extracted(text), True) if tags > self.max_count else None
        if "<" not in text and "&" not in text:
            return None
        if not (MARKUP.search(text) or ENTITIES.search(text)):
            return None
        changed, count = counted(text, _cleaned)
        return Edit("html_tags", count, self.max_count, changed) if count > self.max_count else None


def _cleaned(piece: str) -> tuple[str, int]:
    """(The piece without markup, number of tags, comments and entities)."""
    piece, hidden = _without_hidden(piece)
    piece, breaks = BREAKS.subn("\n", piece)
    piece, tags = TAGS.subn("", piece)
    piece, entities = _without_entities(piece)
    return piece, hidden + breaks + tags + entities


def _extracted(page: str) -> str:
    """The text of a page; markup that the page displays is escaped with entities."""
    try:
        text = EXTRACTOR.text(page.encode(), "utf-8", most_bytes=MOST_BYTES, seconds=SECONDS)
    except Refused:
        text = ""
    return outside_protected(text, lambda piece: _spelled(piece.replace("<", LESS).replace(">", GREATER)))


def _without_hidden(piece: str) -> tuple[str, int]:
    """(The piece without scripts, styles and comments, their number). A missing end tag is searched once, where a
    regular expression would search it from every start tag."""
    kept, at, count, endless = [], 0, 0, set()
    for opening in HIDDEN.finditer(piece):
        kind = (opening[1] or opening[2]).lower()
        if opening.start() < at or kind in endless:
            continue
        if not (end := ENDS[kind].search(piece, opening.end())):
            endless.add(kind)
            continue
        kept.append(piece[at : opening.start()])
        at = end.end()
        count += 1
    return "".join([*kept, piece[at:]]), count


def _without_entities(piece: str) -> tuple[str, int]:
    """(The piece with entities decoded, number of entities)."""
    if "&" not in piece or LESS in piece or GREATER in piece:
        return piece, 0
    changed, count = ENTITIES.subn(_character, piece)
    spelled = _spelled(changed)
    return spelled, count - len(ENTITIES.findall(spelled))


def _character(match: re.Match) -> str:
    """The character of an entity; the entity itself if HTML does not define its name."""
    entity = match["name"] + ";"
    if entity[0] != "#" and entity not in html5:
        return match[0]
    character = html.unescape(f"&{entity}")
    return {"<": LESS, ">": GREATER}.get(character) or standard_characters(character)[0]


def _spelled(piece: str) -> str:
    """The piece with LESS and GREATER as entities again where they would form a tag, else as `<` and `>`."""
    shown = piece.replace(LESS, "<").replace(GREATER, ">")
    parts, at = [], 0
    for tag in MARKUP.finditer(shown):
        if piece[tag.start()] == LESS:
            parts += [shown[at : tag.start()], tag[0].replace("<", "&lt;").replace(">", "&gt;")]
            at = tag.end()
    return "".join([*parts, shown[at:]])
