"""HTML left in text: tags, comments and entities."""

import html
import re

from pydantic.dataclasses import dataclass

from data_pipeline.edits.base import Edit, edit, substitute
from data_pipeline.protected import outside_protected
from data_pipeline.thresholds import STRICT, Count

# Names of HTML alone: `<stdin>`, `List<int>` and a heart `<3` are no tags.
NAMES = (
    "a|abbr|article|aside|b|big|blockquote|body|br|button|caption|center|cite|code|col|dd|del|details|div|dl|dt|em|"
    "fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|"
    "meta|nav|noscript|ol|option|p|pre|script|section|select|small|span|strike|strong|style|sub|summary|sup|table|"
    "tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|video"
)
HIDDEN = re.compile(r"<(script|style|!doctype)\b|<(!--)", re.IGNORECASE)  # what nobody sees, up to its end
ENDS = {
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
    "!doctype": re.compile(">"),
    "!--": re.compile("-->"),
}
# Attributes have names: `a <b && c> d` compares.
ATTRIBUTES = r"""(?:\s+[a-z][\w:.-]*(?:\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s<>"']+))?)*"""
TAGS = re.compile(rf"</?(?:{NAMES}){ATTRIBUTES}\s*/?>", re.IGNORECASE)
BREAKS = re.compile(r"<(?:br|hr|/p|/div|/li|/tr|/h[1-6]|/blockquote)\b[^<>]*>[ \t]*\n?", re.IGNORECASE)
ENTITIES = re.compile(r"&(?:[a-z]{2,8}|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)
PAGE = re.compile(r"<(?:!doctype\s+html|html|body)\b", re.IGNORECASE)


@edit("html")
@dataclass(frozen=True, config=STRICT)
class Html:
    """Takes HTML out when there are more than `max_count` tags and entities: a whole page goes through the extractor
    that reads pages, stray tags in other text are removed and entities become what they stand for."""

    max_count: Count = 0

    def __call__(self, text: str) -> Edit | None:
        if PAGE.search(text):
            from data_pipeline.readers.base import Found
            from data_pipeline.readers.html import page_text

            found = page_text(text, "")
            changed = found.text if isinstance(found, Found) else ""
            return Edit("html_tags", len(TAGS.findall(text)), self.max_count, changed)
        changed, scripts = _without_hidden(text)
        changed, breaks = substitute(BREAKS, "\n", changed)
        changed, tags = substitute(TAGS, "", changed)
        changed, entities = substitute(ENTITIES, lambda match: html.unescape(match.group()), changed)
        count = scripts + breaks + tags + entities
        return Edit("html_tags", count, self.max_count, changed) if count > self.max_count else None


def _without_hidden(text: str) -> tuple[str, int]:
    """The text without scripts, styles, comments and document types, and how many there were. An end that is not there
    is looked for once, where a regular expression would look for it from every beginning."""
    count = 0

    def cut(piece: str) -> str:
        nonlocal count
        kept, at, endless = [], 0, set()
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
        return "".join([*kept, piece[at:]])

    return (outside_protected(text, cut), count) if HIDDEN.search(text) else (text, 0)
