"""Measures the rules: `python -m data_pipeline.canaries pipeline=text input=FOLDER output=FOLDER [per_kind=50]`.

Adds canaries (noise of known kinds, and good text that looks odd) to the sources' real documents, runs the pipeline,
and reports the drops per kind and rule. The output is a separate run, never training data. Exit codes as for
`data_pipeline.run`.
"""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data_pipeline.canary_texts import GOOD, NOISE
from data_pipeline.cli import command, overrides
from data_pipeline.config import Settings, compose
from data_pipeline.errors import InputError
from data_pipeline.letters import plain
from data_pipeline.sources import Jsonl

SOURCE = "canaries"
STAGES = ("rules", "exact_duplicates", "line_duplicates", "near_duplicates")  # folders of drops/, in order
DUPLICATE = "_duplicate"  # suffix of the names of deduplication rules
SENTENCE = re.compile(r"[.!?]\s")
FIGURES = ("recall", "precision", "precision_with_real")
HOST_BYTES = (800, 20_000)  # a shorter text is too little to shuffle; a longer one makes a canary too easy to find


def plant(settings: Settings, per_kind: int, seed: int = 0) -> Settings:
    """Writes canaries made from the sources' documents beside the output, and returns the settings of a run over both.
    Sources have a higher priority than canaries, so that of near duplicates the real document stays. Raises InputError
    when the sources have too little text."""
    hosts = _hosts(settings, 2 * per_kind, seed)
    generator = random.Random(seed)
    lines = []
    for kind, make in {**NOISE, **GOOD}.items():
        for number in range(per_kind):
            text = make(hosts[number % len(hosts)], generator)
            lines.append(json.dumps({"id": f"{kind}/{number}", "text": text}, ensure_ascii=False))
    folder = Path(f"{settings.output}.canaries")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "canaries.jsonl").write_text("\n".join(lines) + "\n")
    ranked = {name: replace(source, priority=source.priority + 1) for name, source in settings.sources.items()}
    planted = Jsonl(kind="jsonl", path=str(folder), priority=0)
    return replace(settings, sources={**ranked, SOURCE: planted})


def _hosts(settings: Settings, wanted: int, seed: int) -> list[str]:
    """A random sample of the first texts for which `is_host` holds."""
    from data_pipeline.readers import ReadSources

    texts = []
    for document in ReadSources(settings.sources, Path(f"{settings.output}.canaries/quarantine")).run():
        if is_host(document.text):
            texts.append(document.text)
            if len(texts) == 20 * wanted:
                break
    if len(texts) < wanted:
        raise InputError(
            f"per_kind={wanted // 2} needs {wanted} documents of prose of {HOST_BYTES[0]} to {HOST_BYTES[1]} bytes, "
            f"but the sources have {len(texts)}: lower per_kind, or add text"
        )
    return random.Random(seed).sample(texts, wanted)


def is_host(text: str) -> bool:
    """Whether a canary can be made from a text: prose of HOST_BYTES. Tables and code are excluded: shuffled words would
    not make them wrong."""
    if not HOST_BYTES[0] <= len(text) <= HOST_BYTES[1]:
        return False
    visible = "".join(plain(text).split())
    return sum(map(str.isalpha, visible)) >= 0.85 * len(visible) and len(SENTENCE.findall(text)) >= 8


def score(output: Path) -> dict:
    """Scores of a run with canaries.

    summary: overall recall and precision, and the lost shares of odd-looking and of real text;
    stages: {stage: figures of the noise that reached it, and `kinds`, figures per kind};
    kinds: {kind: planted, dropped, by which rule, and figures of noise or the lost share of good text}.

    Figures: see `_figures`. A good document dropped as a duplicate is not lost, because a copy stays."""
    kinds = _planted(output)
    dropped, stages = {}, {}
    noise = {identity for identity, kind in kinds.items() if kind in NOISE}
    left = set(noise)
    for stage in STAGES:
        rules = {}
        for path in sorted(output.glob(f"drops/{stage}/*.jsonl")):
            for record in map(json.loads, path.read_bytes().splitlines()):
                rules[record["id"]] = record["filter"]
        if rules:
            by_kind = {kind: {identity for identity in left if kinds[identity] == kind} for kind in NOISE}
            stages[stage] = {
                **_figures(left, rules, set(rules.values()), kinds),
                "kinds": {kind: _kind_figures(members, rules, kinds) for kind, members in by_kind.items() if members},
            }
        left -= rules.keys()
        dropped |= rules
    entries = {}
    for kind in (*NOISE, *GOOD):
        members = {identity for identity, its_kind in kinds.items() if its_kind == kind}
        by = Counter(dropped[identity] for identity in members if identity in dropped)
        entry = {"noise": kind in NOISE, "planted": len(members), "dropped": by.total(), "by": dict(by.most_common())}
        lost = sum(count for rule, count in by.items() if not rule.endswith(DUPLICATE))
        figures = _kind_figures(members, dropped, kinds)
        entries[kind] = entry | ({k: figures[k] for k in FIGURES} if kind in NOISE else {"lost": lost / len(members)})
    read = json.loads((output / "report.json").read_bytes())["stages"][0]["sources"]
    real = sum(entry["documents"] for source, entry in read.items() if source != SOURCE)
    real_lost = sum(identity not in kinds and not rule.endswith(DUPLICATE) for identity, rule in dropped.items())
    over_all = _figures(noise, dropped, set(dropped.values()), kinds)
    summary = {
        **{name: over_all[name] for name in FIGURES},
        "odd_good_text_lost": sum(entries[kind]["lost"] for kind in GOOD) / len(GOOD),
        "real_text_lost": real_lost / max(real, 1),
    }
    return {"summary": summary, "stages": stages, "kinds": entries}


def _kind_figures(members: set[str], rules: dict[str, str], kinds: dict[str, str]) -> dict:
    """Figures of one kind of noise; its precision covers the rules that dropped any of the kind."""
    return _figures(members, rules, {rules[identity] for identity in members if identity in rules}, kinds)


def _figures(reached: set[str], rules: dict[str, str], answering: set[str], kinds: dict[str, str]) -> dict:
    """Recall: share of noise `reached` that was dropped. Precision: share of noise in the drops of rules `answering`.

    `precision` counts only planted documents, whose kind is known; `precision_with_real` counts every real document as
    good, so it is too low where the sources contain noise. null when nothing was dropped.

    rules: {document: the rule that dropped it}; kinds: {planted document: its kind}.
    """
    taken = [identity for identity, rule in rules.items() if rule in answering]
    noise = sum(kinds.get(identity) in NOISE for identity in taken)
    lost = [i for i in taken if kinds.get(i) not in NOISE and not rules[i].endswith(DUPLICATE)]
    odd = sum(identity in kinds for identity in lost)
    dropped = len(reached & rules.keys())
    return {
        "reached": len(reached),
        "dropped": dropped,
        "recall": dropped / max(len(reached), 1),
        "precision": noise / (noise + odd) if noise + odd else None,
        "precision_with_real": noise / (noise + len(lost)) if noise + len(lost) else None,
    }


def _planted(output: Path) -> dict[str, str]:
    """{document id: kind} of all canaries."""
    lines = Path(f"{output}.canaries/canaries.jsonl").read_bytes().splitlines()
    return {
        f"{SOURCE}/canaries.jsonl:{number}": json.loads(line)["id"].partition("/")[0]
        for number, line in enumerate(lines, 1)
    }


def measure(settings: Settings, per_kind: int) -> dict:
    """Plants canaries, runs the pipeline, and adds the scores to the run's report."""
    from data_pipeline.files import replace_file
    from data_pipeline.report_page import page
    from data_pipeline.run import run

    output = Path(settings.output)
    if settings.executor != "local":
        raise InputError(f"executor={settings.executor}: canaries can be measured with executor=local only")
    report = run(plant(settings, per_kind))
    report["canaries"] = score(output)
    replace_file(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    replace_file(output / "report.html", page(report).encode())
    return report["canaries"]


@command
def main(arguments: list[str]) -> None:
    given = overrides("data_pipeline.canaries", __doc__, arguments, Settings)
    counts = [part for part in given if part.startswith("per_kind=")]
    number = counts[-1].partition("=")[2] if counts else "50"
    if not number.isdigit() or int(number) < 1:
        raise InputError(f"per_kind={number} must be a whole number of at least 1")
    scores = measure(compose([part for part in given if part not in counts]), int(number))
    for kind, entry in scores["kinds"].items():
        by = ", ".join(f"{rule} {count}" for rule, count in entry["by"].items())
        print(f"{kind:20} {'noise' if entry['noise'] else 'good':5} {entry['dropped']:4} of {entry['planted']:4}  {by}")
    for stage, entry in scores["stages"].items():
        line = f"{stage:20} {entry['dropped']:4} of {entry['reached']:4} of the noise that reached it"
        print(line, *(f"{name} {entry[name]:.4f}" for name in FIGURES if entry[name] is not None), sep=", ")
    print(", ".join(f"{name} {value:.4f}" for name, value in scores["summary"].items() if value is not None))


if __name__ == "__main__":
    sys.exit(main())
