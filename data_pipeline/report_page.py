"""The report as one HTML page: no script, nothing loaded from elsewhere, every text of a document shown as text."""

from collections.abc import Iterable
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem; margin: .2rem 0 .8rem }
svg text { font: 13px system-ui, sans-serif } summary { cursor: pointer }
"""
WIDTH, HEIGHT, BAR, GAP = 1000, 130, 14, 46  # of the flow picture, in its own units


def page(report: dict) -> str:
    """The page of what `write_report` made."""
    parts = [
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>Cleaning report</title><style>{STYLE}</style></head><body><h1>Cleaning report</h1>",
        flow(report["stages"]),
        "<h2>Stages</h2><p>Tokens before the tokenizer are estimates from bytes.</p>",
        _stages(report["stages"]),
        "<h2>By source</h2>",
        _groups(report["stages"], "sources"),
        "<h2>By language</h2><p>A language is known once the rules have run; — stands for none.</p>",
        _groups(report["stages"], "languages"),
        "<h2>Quarantined</h2>",
        _table(
            ("reason", "documents", "bytes", "for example"),
            (
                (name, e["documents"], e["bytes"], "; ".join(f"{x['id']}: {x['detail']}" for x in e["examples"][:1]))
                for name, e in report["quarantine"].items()
            ),
        ),
        "<h2>Edits</h2>",
        _table(
            ("edit", "documents", "sum of values"),
            ((name, entry["documents"], entry["value"]) for name, entry in report["edits"].items()),
        ),
        "<h2>Drops</h2>",
        *(_rule(name, entry) for name, entry in report["drops"].items()),
        "<h2>Shards</h2>",
        _table(
            ("split", *next(iter(report["splits"].values()))),
            ((name, *entry.values()) for name, entry in report["splits"].items()),
        ),
        *(_canaries(report["canaries"]) if report.get("canaries") else ()),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def flow(stages: list[dict]) -> str:
    """A picture of the bytes that stages pass on: a bar a stage, a band to the next, and what branches off."""
    largest = max((stage["bytes"] for stage in stages), default=0) or 1
    step = WIDTH / max(len(stages), 1)
    heights = [stage["bytes"] / largest * HEIGHT for stage in stages]
    shapes = []
    for place, (stage, height) in enumerate(zip(stages, heights, strict=True)):
        left, top = place * step, GAP
        if place + 1 < len(stages):
            after, right = heights[place + 1], (place + 1) * step
            shapes.append(
                f'<path fill="#9ecae1" d="M{left + BAR:.1f},{top} L{right:.1f},{top} L{right:.1f},{top + after:.1f} '
                f'L{left + BAR:.1f},{top + after:.1f} Z"/>'
            )
            if height > after:
                bend = left + BAR + step / 3
                shapes.append(
                    f'<path fill="#f4b183" d="M{left + BAR:.1f},{top + after:.1f} L{left + BAR:.1f},{top + height:.1f} '
                    f"Q{bend:.1f},{top + height:.1f} {bend:.1f},{top + HEIGHT + 20} L{bend + height - after:.1f},"
                    f"{top + HEIGHT + 20} Q{bend + height - after:.1f},{top + after:.1f} {left + BAR:.1f},"
                    f'{top + after:.1f} Z"/>'
                )
        lost = stages[place - 1]["bytes"] - stage["bytes"] if place else 0
        share = f" (−{lost / stages[place - 1]['bytes']:.1%})" if lost and stages[place - 1]["bytes"] else ""  # noqa: RUF001
        shapes.append(f'<rect x="{left:.1f}" y="{top}" width="{BAR}" height="{max(height, 1):.1f}" fill="#2b6cb0"/>')
        shapes.append(f'<text x="{left:.1f}" y="16">{escape(stage["stage"])}{share}</text>')
        shapes.append(f'<text x="{left:.1f}" y="34">{_short(stage["bytes"])}B, {stage["documents"]:,} docs</text>')
    view = f"0 0 {WIDTH} {GAP + HEIGHT + 24}"
    return f'<svg viewBox="{view}" width="100%" role="img" aria-label="bytes by stage">{"".join(shapes)}</svg>'


def _stages(stages: list[dict]) -> str:
    rows = []
    for before, stage in zip([None, *stages], stages, strict=False):
        for key in ("documents", "bytes", "tokens_estimated"):
            into = before[key] if before else stage[key]
            kept = f"{stage[key] / into:.2%}" if into else ""
            rows.append((stage["stage"], key.replace("_", " "), into, stage[key], into - stage[key], kept))
    return _table(("stage", "of", "in", "out", "gone", "kept"), rows)


def _groups(stages: list[dict], kind: str) -> str:
    names = sorted({name for stage in stages for name in stage[kind]})
    header = (kind[:-1], *(f"{stage['stage']}: {unit}" for stage in stages for unit in ("documents", "bytes")))
    rows = [
        (name or "—", *(stage[kind].get(name, {}).get(unit, 0) for stage in stages for unit in ("documents", "bytes")))
        for name in names
    ]
    return _table(header, rows)


def _rule(name: str, entry: dict) -> str:
    counts = ", ".join(f"{key} {count:,}" for key, count in sorted(entry["measures"].items()))
    examples = "".join(
        f"<p>{escape(str(e['id']))}: {escape(str(e['measure']))} {_value(e['value'])}, threshold "
        f"{_value(e['threshold'])}</p><pre>{escape(e['excerpt'])}</pre>"
        for e in entry["examples"]
    )
    return (
        f"<details><summary><b>{escape(name)}</b>: {entry['documents']:,} documents, {_short(entry['bytes'])}B "
        f"({escape(counts)})</summary>{examples}</details>"
    )


def _canaries(canaries: dict) -> tuple[str, ...]:
    rows = (
        (kind, e["planted"], e["dropped"], e["rate"], ", ".join(f"{k} {v}" for k, v in e["by"].items()))
        for kind, e in canaries["kinds"].items()
    )
    header = ("kind", "planted", "dropped", "share dropped", "by stage or rule")
    summary = ", ".join(f"{key} {value:.4f}" for key, value in canaries["summary"].items())
    return "<h2>Canaries</h2>", f"<p>{escape(summary)}</p>", _table(header, rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [
        "<tr>" + "".join(f"<td{' class=n' * isinstance(v, int | float)}>{_value(v)}</td>" for v in row) + "</tr>"
        for row in rows
    ]
    if not lines:
        return "<p>None.</p>"
    return f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in header)}</tr>{''.join(lines)}</table>"


def _value(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _short(count: float) -> str:
    power = 0
    while count >= 1000 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
