"""The report as one HTML page, without scripts or external resources; document texts are escaped."""

from html import escape

from data_pipeline.html_page import cell, document, short, table, tiles

WIDTH, HEIGHT, BAR, GAP = 1000, 150, 14, 62  # of the flow diagram, in SVG units
FALL, NARROW = 34, 3  # distance of loss bands below the bars, and their minimum thickness


def page(report: dict) -> str:
    parts = [
        _figures(report),
        flow([*report["stages"], _final(report)]),
        "<h2>Stages</h2><p>Tokens are estimates from bytes up to the last stage; those of the shards are counted.</p>",
        _stages([*report["stages"], _final(report)]),
        "<h2>By source</h2>",
        _groups(report["stages"], "sources"),
        "<h2>By language</h2><p>A language is known once the rules have run; — stands for none.</p>",
        _groups(report["stages"], "languages"),
        "<h2>Quarantined</h2><p>What is no document, by reason: every one is a line in quarantine/.</p>",
        table(
            ("reason", "documents", "bytes", "for example"),
            (
                (name, e["documents"], e["bytes"], "; ".join(f"{x['id']}: {x['detail']}" for x in e["examples"]))
                for name, e in report["quarantine"].items()
            ),
        ),
        "<h2>Drops</h2><p>By rule, with the measures that it took, the sources, and examples.</p>",
        *(_rule(name, entry, report) for name, entry in _by_documents(report["drops"])),
        "<h2>Edits</h2>",
        table(
            ("edit", "documents", "sum of values"),
            ((name, entry["documents"], entry["value"]) for name, entry in report["edits"].items()),
        ),
        *_tokenizer(report["tokenizer"]),
        "<h2>Shards</h2>",
        table(
            ("split", *(name.replace("_", " ") for name in next(iter(report["splits"].values())))),
            ((name, *entry.values()) for name, entry in report["splits"].items()),
        ),
        table(
            ("source", "category", "epochs", "documents", "bytes", "tokens"),
            ((name, *entry.values()) for name, entry in report["sources"].items()),
        ),
        *(_canaries(report["canaries"]) if report.get("canaries") else ()),
    ]
    return document("Cleaning report", parts)


def _final(report: dict) -> dict:
    """The shards as a last stage, with exact token counts."""
    splits = report["splits"].values()
    sums = {key: sum(split[key] for split in splits) for key in ("documents", "text_bytes", "tokens")}
    return {
        "stage": "shards",
        "documents": sums["documents"],
        "bytes": sums["text_bytes"],
        "tokens_estimated": sums["tokens"],
    }


def _figures(report: dict) -> str:
    final = _final(report)
    first = report["stages"][0] if report["stages"] else final
    quarantined = sum(entry["documents"] for entry in report["quarantine"].values())
    figures = (
        (f"{first['documents']:,}", "documents read"),
        (f"{final['documents']:,}", f"kept, {_share(final['documents'], first['documents'])}"),
        (f"{short(final['bytes'])}B", f"of {short(first['bytes'])}B of text"),
        (short(final["tokens_estimated"]), "tokens"),
        (f"{sum(split['shards'] for split in report['splits'].values()):,}", "shards"),
        (f"{quarantined:,}", "quarantined"),
    )
    return tiles(figures)


def flow(stages: list[dict]) -> str:
    """A diagram of the bytes through the stages: a bar per stage, a band to the next stage, a band of the drops."""
    largest = max((stage["bytes"] for stage in stages), default=0) or 1
    step = (WIDTH - BAR - 120) / max(len(stages) - 1, 1)  # room for the last bar's label
    heights = [stage["bytes"] / largest * HEIGHT for stage in stages]
    shapes = []
    for place, (stage, height) in enumerate(zip(stages, heights, strict=True)):
        left, top = place * step, GAP
        lost = stages[place - 1]["bytes"] - stage["bytes"] if place else 0
        if place:
            shapes.append(_band(left - step + BAR, left, top, heights[place - 1], height))
        share = _lost(lost / stages[place - 1]["bytes"]) if place and stages[place - 1]["bytes"] else ""
        shapes.append(f'<rect class="bar" x="{left:.1f}" y="{top}" width="{BAR}" height="{max(height, 1):.1f}"/>')
        shapes.append(f'<text x="{left:.1f}" y="14">{escape(stage["stage"])}</text>')
        shapes.append(f'<text class="soft" x="{left:.1f}" y="32">{short(stage["bytes"])}B {escape(share)}</text>')
        shapes.append(f'<text class="soft" x="{left:.1f}" y="50">{stage["documents"]:,} docs</text>')
    view = f"0 0 {WIDTH} {GAP + HEIGHT + FALL + 8}"
    return f'<svg viewBox="{view}" width="100%" role="img" aria-label="bytes by stage">{"".join(shapes)}</svg>'


def _lost(share: float) -> str:
    if share <= 0:
        return ""
    return "−<0.1%" if share < 0.001 else f"−{share:.1%}"  # noqa: RUF001


def _band(left: float, right: float, top: float, before: float, after: float) -> str:
    """SVG of the flow diagram: the band from a stage's bar to the next, and below it the band of drops."""
    band = f"M{left:.1f},{top} H{right:.1f} V{top + after:.1f} H{left:.1f} Z"
    if before <= after:
        return f'<path class="band" d="{band}"/>'
    wide, bottom = max(before - after, NARROW), GAP + HEIGHT + FALL
    low, edge = top + after + wide, left + (right - left) * 0.45
    lost = (
        f"M{left:.1f},{top + after:.1f} H{edge:.1f} Q{edge + wide:.1f},{top + after:.1f} {edge + wide:.1f},{low:.1f} "
        f"V{bottom} H{edge:.1f} V{low:.1f} H{left:.1f} Z"
    )
    return f'<path class="band" d="{band}"/><path class="lost" d="{lost}"/>'


def _stages(stages: list[dict]) -> str:
    rows = []
    for before, stage in zip([None, *stages], stages, strict=False):
        row = [stage["stage"]]
        for key in ("documents", "bytes", "tokens_estimated"):
            into = before[key] if before else stage[key]
            row += [into, stage[key], _share(stage[key], into)]
        rows.append(row)
    units = ("documents", "bytes", "tokens")
    return table(("stage", *(f"{unit} {side}" for unit in units for side in ("in", "out", "kept"))), rows)


def _groups(stages: list[dict], kind: str) -> str:
    names = sorted({name for stage in stages for name in stage[kind]})
    nothing = {"documents": 0, "bytes": 0, "tokens_estimated": 0}
    header = (kind[:-1], *(stage["stage"] for stage in stages))
    return table(header, ((name or "—", *(stage[kind].get(name, nothing) for stage in stages)) for name in names))


def _by_documents(drops: dict) -> list[tuple[str, dict]]:
    return sorted(drops.items(), key=lambda item: (-item[1]["documents"], item[0]))


def _tokenizer(tokenizer: dict) -> tuple[str, ...]:
    sample, proven = tokenizer["sample"], tokenizer["round_trip"]
    rows = []
    for name in sorted({*sample, *proven}):
        part, proof = sample.get(name, {}), proven.get(name, {"documents": 0, "bytes": 0})
        share = f"{part['share']:.1%}" if part else ""
        taken = [part.get(key, "") for key in ("available_bytes", "wanted_bytes", "bytes", "documents")]
        rows.append((name, share, *taken, proof["documents"], proof["bytes"]))
    sampled = ("share", "bytes there", "bytes wanted", "bytes taken", "documents taken")
    words = "Trained on this sample" if tokenizer["trained"] else "An existing file"
    return (
        "<h2>Tokenizer</h2>",
        f"<p>{words}; {tokenizer['vocab_size']:,} entries. Documents proven came back from their tokens to the byte.",
        "</p>",
        table(("category", *sampled, "documents proven", "bytes proven"), rows),
    )


def _rule(name: str, entry: dict, report: dict) -> str:
    read = report["stages"][0]["documents"] if report["stages"] else 0
    share = entry["documents"] / max(read, 1)
    examples = "".join(
        f"<p>{escape(str(e['id']))}: {escape(str(e['measure']))} {cell(e['value'])}, threshold "
        f"{cell(e['threshold'])}{_kept(e)}</p><pre>{escape(e['excerpt'])}</pre>"
        for e in entry["examples"]
    )
    counts, sources = _counts(entry["measures"]), _counts(entry["sources"])
    return (
        f"<details><summary><b>{escape(name)}</b>: {entry['documents']:,} documents, {share:.1%} of those read, "
        f"{short(entry['bytes'])}B <small>({escape(counts)}; from {escape(sources)})</small></summary>"
        f"{examples}</details>"
    )


def _kept(example: dict) -> str:
    return f"; kept: {escape(str(example['kept']))}" if "kept" in example else ""


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{key} {count:,}" for key, count in sorted(counts.items()))


def _canaries(canaries: dict) -> tuple[str, ...]:
    figures = ("recall", "precision", "precision_with_real")
    names = ("recall", "precision", "precision were all real text good")
    kinds = (
        (kind, e["planted"], e["dropped"], *(e.get(key) for key in (*figures, "lost")), _counts(e["by"]))
        for kind, e in canaries["kinds"].items()
    )
    stages = (
        (stage, kind, *(e[key] for key in ("reached", "dropped", *figures)))
        for stage, whole in canaries["stages"].items()
        for kind, e in (("all noise", whole), *whole["kinds"].items())
    )
    summary = ", ".join(f"{key} {value:.4f}" for key, value in canaries["summary"].items() if value is not None)
    return (
        "<h2>Canaries</h2>",
        f"<p>{escape(summary)}</p>",
        table(("kind", "planted", "dropped", *names, "good text lost", "by rule"), kinds),
        table(("stage", "kind", "reached it", "dropped", *names), stages),
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
