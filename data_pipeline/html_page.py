"""HTML pages without scripts or external resources, light and dark: what all pages of this project share. Texts are
escaped."""

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --soft: #5c6470; --line: #d9dde3; --box: #f4f6f8; --back: #fff;
  --bar: #2b6cb0; --band: #a8cbe8; --lost: #e59866 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa4b1; --line: #353c46; --box: #20252c;
  --back: #15181d; --bar: #63a4e0; --band: #27476a; --lost: #b8683a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: var(--text);
  background: var(--back) }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.2rem } p { margin: .3rem 0; color: var(--soft) }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .5rem 0 1rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom } th.n { text-align: right }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
small { color: var(--soft) } .figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 1.5rem }
.figures div { background: var(--box); border-radius: 8px; padding: .6rem 1rem } .figures b { display: block;
  font-size: 1.25rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; background: var(--box); padding: .5rem;
  margin: .2rem 0 .8rem; border-radius: 6px; max-height: 12rem; overflow: auto }
details { border-bottom: 1px solid var(--line); padding: .25rem 0 } summary { cursor: pointer }
svg text { font: 13px system-ui, sans-serif; fill: var(--text) } svg .soft { fill: var(--soft) }
svg .bar { fill: var(--bar) } svg .band { fill: var(--band) } svg .lost { fill: var(--lost) }
"""


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page. title: its heading. parts: HTML below it. style: CSS besides STYLE. Bytes of a file's name that are
    no UTF-8 are escaped."""
    head = (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name=viewport content="width=device-width">',
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><h1>{escape(title)}</h1>",
    )
    return "\n".join((*head, *parts, "</body></html>\n")).encode(errors="backslashreplace").decode()


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Figures in large print. figures: (value, what it is)."""
    each = (f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in figures)
    return f"<div class=figures>{''.join(each)}</div>"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Columns whose first value is a number, or ends with %, are aligned as numbers."""
    rows = [list(row) for row in rows]
    if not rows:
        return "<p>None.</p>"
    lines = ["<tr>" + "".join(f"<td{' class=n' * _is_figure(v)}>{cell(v)}</td>" for v in row) + "</tr>" for row in rows]
    figures = [_is_figure(value) for value in rows[0]]
    head = "".join(f"<th{' class=n' * n}>{escape(h)}</th>" for h, n in zip(header, figures, strict=True))
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float | dict) or (isinstance(value, str) and value.endswith("%"))


def cell(value: object) -> str:
    """HTML of a table's value."""
    if isinstance(value, dict):  # documents, bytes and tokens of a stage
        rest = f"{short(value['bytes'])}B, {short(value['tokens_estimated'])} tokens"
        return f"{value['documents']:,}<br><small>{rest}</small>"
    if isinstance(value, int):
        return f"{value:,}"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def short(count: float) -> str:
    """Three digits and a prefix of the SI."""
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
