"""Soak: train for `minutes` while faults come at random times, then compare with an undisturbed run, bit for bit.

    python -m launch.soak minutes=60 mtbf_s=120 seed=1 output=runs/soak

    minutes     of training under faults (60); an undisturbed run of as many steps follows
    mtbf_s      mean seconds from a start's launch, or a fault that it survived, to its next fault: exponential (120)
    seed        of times, kinds and ranks (0)
    faults      kinds to choose from, joined by commas (all FAULTS of launch/soak/faults.py; GPU_FAULTS need a GPU)
    heal_s      seconds that a full disk or a read-only folder lasts (20)
    patience_s  seconds within which a start must train its first step, and end after a fault that ends it (300)
    processes   trainers on this machine (2)
    output      folder; it must not hold a soak already (runs/soak)

Other words are overrides for training, which is the demo's model on a small corpus made here unless data.manifest= is
among them. output/summary.json has every fault, goodput and time lost by cause; output/trainers.log what the trainers
print. Exit code 1 when the runs differ, a start ends with an exit code that its fault does not allow, or files or
processes are left behind; 2 when the trainers refuse the settings.
"""

from __future__ import annotations

import difflib
import json
import math
import random
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.soak.faults import FAULTS
from launch.soak.soak import KNOWN, ROOT, LocalTrainers, Soak
from megatron_tn.config import unknown_key
from megatron_tn.training.goodput import CAUSES, goodput_of
from megatron_tn.training.run_folder import RunFolder

console = Console(highlight=False, markup=False)

TRAINING = (
    "model=demo",
    "model.vocab_size=512",
    "parallel.tp=2",
    "data.sequence_length=256",
    "data.global_batch=8",
    "data.micro_batch=8",
    "data.workers=0",
    "schedule=constant",
    "schedule.steps=1000000",
    "schedule.warmup_steps=60",
    "optim.lr=4e-3",
    "deterministic=true",
    "checkpoint.every=20",
    "checkpoint.keep=3",
    "evaluation.every=100",
    "evaluation.max_documents=20",
    "hang_timeout_s=12",
    "distributed_timeout_s=60",
    "logging=quiet",
)


@dataclass(frozen=True)
class Settings:
    minutes: float = 60.0
    mtbf_s: float = 120.0
    seed: int = 0
    faults: tuple[str, ...] = tuple(FAULTS)
    heal_s: float = 20.0
    patience_s: float = 300.0
    processes: int = 2
    output: str = "runs/soak"
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> Settings:
        """Raises ValueError, one line."""
        numbers = dict.fromkeys(("minutes", "mtbf_s", "heal_s", "patience_s"), float)
        kinds = numbers | {"seed": int, "processes": int, "output": str}
        found: dict[str, Any] = {"overrides": ()}
        for word in words:
            name, equals, value = word.partition("=")
            if name == "faults":
                found[name] = tuple(value.split(","))
            elif equals and name in kinds:
                try:
                    found[name] = kinds[name](value)
                except ValueError:
                    raise ValueError(f"{word}: not a number") from None
            elif equals and "." not in name and difflib.get_close_matches(name, kinds, n=1, cutoff=0.8):
                raise ValueError(unknown_key(name, kinds))
            elif equals:
                found["overrides"] += (word,)
            else:
                raise ValueError(f"{word}: not NAME=VALUE")
        settings = cls(**found)
        for name in ("minutes", "mtbf_s", "patience_s", "processes"):
            if not 0 < getattr(settings, name) < math.inf:  # nor "nan"
                raise ValueError(f"{name}={getattr(settings, name)} must be above 0 and finite")
        if not 0 <= settings.heal_s < math.inf:
            raise ValueError(f"heal_s={settings.heal_s} must be at least 0 and finite")
        if strange := [name for name in settings.faults if name not in KNOWN]:
            raise ValueError(f"faults={','.join(strange)}: unknown; there are {', '.join(KNOWN)}")
        if Path(settings.output, "run").exists():
            raise ValueError(f"output={settings.output} holds a soak already: choose another, or remove it")
        return settings


def make_corpus(folder: Path) -> Path:
    """Shards of a part of the standard library; returns their folder."""
    source = Path(sysconfig.get_path("stdlib"), "asyncio")
    words = ["pipeline=code", f"input={source}", f"output={folder}", "tokenizer.vocab_size=512", "tasks=2"]
    command = [sys.executable, "-m", "data_pipeline.run", *words, "near_duplicates=null"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def summary_of(settings: Settings, soak: Soak) -> dict[str, Any]:
    goodput = goodput_of(soak.folder)
    return {
        "settings": asdict(settings),
        "steps": soak.folder.status().get("step", 0),
        "faults": Counter(event.fault for event in soak.events),
        "goodput": goodput and asdict(goodput) | {"share": goodput.share},
        "events": [asdict(event) for event in soak.events],
        "problems": soak.problems,
    }


def refusals(log: Path) -> list[str]:
    """What the trainers said of settings that they did not take."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]


def show(summary: dict[str, Any]) -> None:
    table = Table(title=f"{summary['steps']:,} steps, {len(summary['events'])} faults", show_header=False)
    for name, count in sorted(summary["faults"].items()):
        seconds = [event["took_s"] for event in summary["events"] if event["fault"] == name]
        table.add_row(f"{count} x {name}", f"{sum(seconds) / count:.1f} s each, to the end of it or of the start")
    if goodput := summary["goodput"]:
        table.add_section()
        table.add_row("goodput", f"{goodput['share']:.1%} of {goodput['wall_s']:,.0f} s in {goodput['starts']} starts")
        for cause, seconds in goodput["lost_s"].items():
            table.add_row(f"lost: {CAUSES[cause]}", f"{seconds / goodput['wall_s']:.1%}")
    console.print(table)
    for line in summary["problems"] or ["steps, data, losses and final weights equal an undisturbed run's bit for bit"]:
        console.print(line)


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        settings = Settings.parse(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    training = [*TRAINING, *settings.overrides]
    shown = [sys.executable, "-m", "megatron_tn.train", "--cfg", "job", *training]  # names and values, before a corpus
    if code := subprocess.run(shown, check=False, stdout=subprocess.DEVNULL).returncode:
        return code
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    if not any(word.startswith("data.manifest=") for word in training):
        data = make_corpus(output / "data")
        training += [f"data.manifest={data}/train/manifest.json", f"evaluation.manifest={data}/heldout/manifest.json"]

    def start(folder: Path, more: Sequence[str]) -> LocalTrainers:
        return LocalTrainers(settings.processes, folder, [*training, *more], output / "trainers.log")

    soak = Soak(
        RunFolder(output / "run"),
        start,
        processes=settings.processes,
        mtbf_s=settings.mtbf_s,
        kinds=settings.faults,
        heal_s=settings.heal_s,
        choice=random.Random(settings.seed),
        patience_s=settings.patience_s,
        say=console.print,
    )
    end = time.monotonic() + 60 * settings.minutes
    soak.run(lambda: time.monotonic() > end)
    if soak.problems and not soak.folder.is_there and (lines := refusals(output / "trainers.log")):
        print("\n".join(lines), file=sys.stderr)
        return 2
    if not soak.problems:
        soak.compare(RunFolder(output / "undisturbed"))
    summary = summary_of(settings, soak)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
