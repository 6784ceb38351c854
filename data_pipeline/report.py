"""report.json: documents and bytes in and out of each stage and rule, and what came out."""

import json
from collections import defaultdict
from pathlib import Path

from data_pipeline.shards.manifest import Manifest, replace_file

STAGES = ("read", "rules", "exact", "lines", "near")


def write_report(output: Path, work: Path, splits: tuple[str, ...]) -> dict:
    """Writes output/report.json from tallies, drops and manifests; returns it. Equal runs write equal reports, so it
    holds no times."""
    tallies = [(name, _tally(folder)) for name in STAGES if (folder := work / "tally" / name).is_dir()]
    report = {
        "stages": [{"stage": name, **_sum(tally), "sources": tally} for name, tally in tallies],
        "quarantine": _quarantine(output / "quarantine"),
        "edits": _edits(output / "edits"),
        "drops": _drops(output / "drops"),
        "splits": {split: _split(Manifest.load(output / split / "manifest.json")) for split in splits},
    }
    replace_file(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    return report


def _tally(folder: Path) -> dict[str, dict[str, int]]:
    counts = defaultdict(lambda: {"documents": 0, "bytes": 0})
    for path in sorted(folder.glob("*.json")):
        for source, (documents, size) in json.loads(path.read_bytes()).items():
            counts[source]["documents"] += documents
            counts[source]["bytes"] += size
    return dict(sorted(counts.items()))


def _sum(tally: dict[str, dict[str, int]]) -> dict[str, int]:
    return {key: sum(counts[key] for counts in tally.values()) for key in ("documents", "bytes")}


def _drops(folder: Path) -> dict[str, dict]:
    """{rule: documents, bytes, and of those by measure}."""
    drops: dict[str, dict] = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                entry = drops.setdefault(record["filter"], {"documents": 0, "bytes": 0, "measures": defaultdict(int)})
                entry["documents"] += 1
                entry["bytes"] += record["bytes"]
                entry["measures"][record["measure"]] += 1
    return drops


def _edits(folder: Path) -> dict[str, dict]:
    """{edit: documents, and the sum of their values}."""
    edits: dict[str, dict] = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in lines:
                record = json.loads(line)
                entry = edits.setdefault(record["edit"], {"documents": 0, "value": 0})
                entry["documents"] += 1
                entry["value"] += record["value"]
    return dict(sorted(edits.items()))


def _quarantine(folder: Path) -> dict[str, dict]:
    """{reason: documents (or files that could not be read on), bytes}."""
    reasons: dict[str, dict] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            record = json.loads(line)
            entry = reasons.setdefault(record["reason"], {"documents": 0, "bytes": 0})
            entry["documents"] += 1
            entry["bytes"] += record["bytes"]
    return dict(sorted(reasons.items()))


def _split(manifest: Manifest) -> dict:
    totals = manifest.totals
    return {
        "documents": totals.documents,
        "text_bytes": totals.text_bytes,
        "tokens": totals.tokens,
        "bytes_per_token": round(totals.text_bytes / totals.tokens, 4),
        "shards": totals.shards,
        "vocab_size": manifest.tokenizer.vocab_size,
    }
