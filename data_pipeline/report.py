"""report.json and report.html: documents into and out of each stage, drops per rule, and the resulting shards."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.files import replace_file
from data_pipeline.shards.manifest import Manifest
from data_pipeline.steps.tally import read_tally
from data_pipeline.tokenise import METADATA

STAGES = ("read", "rules", "exact", "lines", "near")
EXAMPLES = 3  # per rule and measure


class WriteReport(PipelineStep):
    """In one task, after the manifests: report.json and report.html."""

    type = "📊 - STATS"
    name = "write report"

    def __init__(self, output: Path, work: Path, splits: tuple[str, ...]):
        super().__init__()
        self.output = output
        self.work = work
        self.splits = splits

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        write_report(self.output, self.work, self.splits)
        return data


def write_report(output: Path, work: Path, splits: tuple[str, ...]) -> dict:
    """Writes output/report.json and report.html from tallies, drops and manifests; returns the report, which has no
    times, so that equal runs have equal reports."""
    from data_pipeline.report_page import page

    manifests = {split: Manifest.load(output / split / "manifest.json") for split in splits}
    results = {split: _split(manifest) for split, manifest in manifests.items()}
    bytes_per_token = sum(s["text_bytes"] for s in results.values()) / sum(s["tokens"] for s in results.values())
    tallies = [(name, read_tally(folder)) for name in STAGES if (folder := work / "tally" / name).is_dir()]
    report = {
        "stages": [{"stage": name, **_stage(tally, bytes_per_token)} for name, tally in tallies],
        "quarantine": _quarantine(output / "quarantine"),
        "edits": _edits(output / "edits"),
        "drops": _drops(output / "drops"),
        "tokenizer": json.loads((output / METADATA).read_bytes()),
        "sources": _sources(manifests),
        "splits": results,
    }
    replace_file(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    replace_file(output / "report.html", page(report).encode())
    return report


def stages_in_words(report: dict) -> str:
    """How many documents each stage has left, in a line."""
    first, *later = report["stages"]
    left = (f"{stage['documents']:,} after {stage['stage']}" for stage in later)
    return ", ".join([f"{first['documents']:,} documents {first['stage']}", *left])


def _stage(tally: dict[tuple[str, str], tuple[int, int]], bytes_per_token: float) -> dict:
    """Totals, also by source and by language. Tokens of stages before the tokenizer are estimated: bytes /
    bytes_per_token of the final shards."""

    def total(counts: list[tuple[int, int]]) -> dict[str, int]:
        size = sum(count[1] for count in counts)
        documents = sum(count[0] for count in counts)
        return {"documents": documents, "bytes": size, "tokens_estimated": round(size / bytes_per_token)}

    grouped: list[dict[str, list[tuple[int, int]]]] = [defaultdict(list), defaultdict(list)]
    for key, count in tally.items():
        for names, name in zip(grouped, key, strict=True):
            names[name].append(count)
    sources, languages = ({name: total(counts) for name, counts in sorted(names.items())} for names in grouped)
    return {**total(list(tally.values())), "sources": sources, "languages": languages}


def _records(paths: list[Path]) -> Iterator[dict]:
    for path in paths:
        with path.open("rb") as lines:
            yield from map(json.loads, lines)


def _quarantine(folder: Path) -> dict[str, dict]:
    """{reason: documents (or partly unreadable files), bytes, examples}."""
    reasons: dict[str, dict] = {}
    for record in _records(sorted(folder.glob("*.jsonl"))):
        entry = reasons.setdefault(record["reason"], {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += record["bytes"]
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append({key: record[key] for key in ("id", "detail")})
    return dict(sorted(reasons.items()))


def _edits(folder: Path) -> dict[str, dict]:
    """{edit: number of edited documents, sum of the measure's values}."""
    edits: dict[str, dict] = {}
    for record in _records(sorted(folder.glob("*.jsonl"))):
        entry = edits.setdefault(record["edit"], {"documents": 0, "value": 0})
        entry["documents"] += 1
        entry["value"] += record["value"]
    return dict(sorted(edits.items()))


def _drops(folder: Path) -> dict[str, dict]:
    """{rule: documents, bytes, documents by measure and by source, and examples with value and threshold}."""
    drops: dict[str, dict] = {}
    for record in _records(sorted(folder.glob("*/*.jsonl"))):
        empty = {"documents": 0, "bytes": 0, "measures": defaultdict(int), "sources": defaultdict(int), "examples": []}
        entry = drops.setdefault(record["filter"], empty)
        entry["documents"] += 1
        entry["bytes"] += record["bytes"]
        entry["measures"][record["measure"]] += 1
        entry["sources"][record["source"]] += 1
        if sum(example["measure"] == record["measure"] for example in entry["examples"]) < EXAMPLES:
            keys = ("id", "measure", "value", "threshold", "kept", "excerpt")
            entry["examples"].append({key: record[key] for key in keys if key in record})
    return drops


def _sources(manifests: dict[str, Manifest]) -> dict[str, dict]:
    """{source: category, epochs, and documents, bytes and tokens in the shards of all splits}."""
    sources: dict[str, dict] = {}
    for manifest in manifests.values():
        for shard in manifest.shards:
            info = manifest.sources[shard.source]
            empty = {"category": info.category, "epochs": info.epochs, "documents": 0, "bytes": 0, "tokens": 0}
            entry = sources.setdefault(shard.source, empty)
            entry["documents"] += shard.documents
            entry["bytes"] += shard.text_bytes
            entry["tokens"] += shard.tokens
    return dict(sorted(sources.items()))


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
