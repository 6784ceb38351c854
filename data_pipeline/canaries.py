"""How well the rules work: `python -m data_pipeline.canaries pipeline=text input=FOLDER output=FOLDER [per_kind=50]`.

Plants noise of known kinds, and good text that looks odd, among the real documents of the sources, runs the pipeline on
all of it, and reports what was dropped of each kind, by which rule. The output is a run of its own, never training
data. Exit codes as for `data_pipeline.run`.
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
from data_pipeline.sources import Jsonl

SOURCE = "canaries"
STAGES = ("rules", "exact_duplicates", "line_duplicates", "near_duplicates")  # folders of drops/, in their order
SENTENCE = re.compile(r"[.!?]\s")
HOST_BYTES = (800, 20_000)  # a text shorter says too little to be shuffled, a longer one makes a canary too easy


def plant(settings: Settings, per_kind: int, seed: int = 0) -> Settings:
    """Writes canaries made from the sources' own documents beside the output, and gives the settings of a run over
    both. Of near duplicates the real document is to stay, so the sources rank above the canaries. Raises InputError
    when there is too little text to make them of."""
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
    """A random sample of the first texts that are found to make canaries of."""
    from data_pipeline.readers import ReadSources

    texts = []
    for document in ReadSources(settings.sources, Path(f"{settings.output}.canaries/quarantine")).run():
        if is_host(document.text):
            texts.append(document.text)
            if len(texts) == 20 * wanted:
                break
    if len(texts) < wanted:
        raise InputError(
            f"per_kind={wanted // 2}: needs {wanted} documents of prose of {HOST_BYTES} bytes, there are {len(texts)}"
        )
    return random.Random(seed).sample(texts, wanted)


def is_host(text: str) -> bool:
    """Whether a canary can be made of a text: prose of a length to be made something of. Tables and code are no prose:
    no order of their words is wrong."""
    if not HOST_BYTES[0] <= len(text) <= HOST_BYTES[1]:
        return False
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) >= 0.85 * len(visible) and len(SENTENCE.findall(text)) >= 8


def score(output: Path) -> dict:
    """What a planted run did: for each kind how many were planted, dropped, and by which rule; for each stage the
    recall of the noise that reached it and the precision of its drops among canaries (null when it dropped none); and
    over all the recall of noise, the shares of odd-looking and of real text lost, and the precision. A good document
    that goes as a duplicate is not lost: its like stays."""
    kinds = _planted(output)
    dropped, stages = {}, {}
    left = {identity for identity, kind in kinds.items() if kind in NOISE}
    for stage in STAGES:
        rules = {}
        for path in sorted(output.glob(f"drops/{stage}/*.jsonl")):
            for record in map(json.loads, path.read_bytes().splitlines()):
                rules[record["id"]] = record["filter"]
        if rules:
            stages[stage] = _stage(rules, left, kinds)
        left -= rules.keys()
        dropped |= rules
    entries = {}
    for kind in (*NOISE, *GOOD):
        members = [identity for identity, its_kind in kinds.items() if its_kind == kind]
        rules = Counter(dropped[identity] for identity in members if identity in dropped)
        gone = sum(rules.values())
        entry = {"planted": len(members), "dropped": gone, "rate": gone / len(members), "by": dict(rules.most_common())}
        entries[kind] = {"noise": kind in NOISE, **entry}
    noise = [entries[kind] for kind in NOISE]
    odd = [entries[kind] for kind in GOOD]
    real_lost = sum(identity not in kinds and not rule.endswith("_duplicate") for identity, rule in dropped.items())
    read = json.loads((output / "report.json").read_bytes())["stages"][0]["sources"]
    real = sum(entry["documents"] for source, entry in read.items() if source != SOURCE)
    caught = sum(e["dropped"] for e in noise)
    lost = sum(count for e in odd for rule, count in e["by"].items() if not rule.endswith("_duplicate"))
    summary = {
        "recall": caught / sum(e["planted"] for e in noise),
        "precision": caught / max(caught + lost, 1),
        "odd_good_text_lost": lost / sum(e["planted"] for e in odd),
        "real_text_lost": real_lost / max(real, 1),
    }
    return {"summary": summary, "stages": stages, "kinds": entries}


def _stage(rules: dict[str, str], reached: set[str], kinds: dict[str, str]) -> dict:
    """One stage's figures. rules: {document: the rule that dropped it here}; reached: noise that was still there."""
    caught = dict.fromkeys(NOISE, 0)
    for identity in rules.keys() & reached:
        caught[kinds[identity]] += 1
    lost = sum(kinds.get(identity) in GOOD and not rule.endswith("_duplicate") for identity, rule in rules.items())
    dropped = sum(caught.values())
    return {
        "noise_reached": len(reached),
        "noise_dropped": dropped,
        "recall": dropped / max(len(reached), 1),
        "precision": dropped / (dropped + lost) if dropped + lost else None,
        "by_kind": {kind: count for kind, count in caught.items() if count},
    }


def _planted(output: Path) -> dict[str, str]:
    """{document id: kind} of all canaries."""
    lines = Path(f"{output}.canaries/canaries.jsonl").read_bytes().splitlines()
    return {
        f"{SOURCE}/canaries.jsonl:{number}": json.loads(line)["id"].partition("/")[0]
        for number, line in enumerate(lines, 1)
    }


def measure(settings: Settings, per_kind: int) -> dict:
    """Plants, runs, scores, and adds the scores to the run's report."""
    from data_pipeline.files import replace_file
    from data_pipeline.report_page import page
    from data_pipeline.run import run

    output = Path(settings.output)
    if settings.executor != "local":
        raise InputError(f"executor={settings.executor}: canaries are measured with executor=local")
    report = run(plant(settings, per_kind))
    report["canaries"] = score(output)
    replace_file(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    replace_file(output / "report.html", page(report).encode())
    return report["canaries"]


@command
def main(arguments: list[str]) -> None:
    given = overrides("data_pipeline.canaries", __doc__, arguments)
    counts = [part for part in given if part.startswith("per_kind=")]
    number = counts[-1].partition("=")[2] if counts else "50"
    if not number.isdigit() or int(number) < 1:
        raise InputError(f"per_kind={number} must be a whole number of at least 1")
    scores = measure(compose([part for part in given if part not in counts]), int(number))
    for kind, entry in scores["kinds"].items():
        by = ", ".join(f"{rule} {count}" for rule, count in entry["by"].items())
        print(f"{kind:20} {'noise' if entry['noise'] else 'good':5} {entry['dropped']:4} of {entry['planted']:4}  {by}")
    for stage, entry in scores["stages"].items():
        dropped = f"{entry['noise_dropped']:4} of {entry['noise_reached']:4} of the noise that reached it"
        precision = "" if entry["precision"] is None else f", precision {entry['precision']:.4f}"
        print(f"{stage:20} {dropped}, recall {entry['recall']:.4f}{precision}")
    print(", ".join(f"{name} {value:.4f}" for name, value in scores["summary"].items()))


if __name__ == "__main__":
    sys.exit(main())
