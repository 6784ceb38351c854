"""Train and evaluate the runs of a plan, each on one GPU, and write a row of figures for each.

    python -m data_pipeline.corpus.join PARTS data/results          (parts that python -m data_pipeline.corpus made)
    python -m launch.results --plan launch/plans/results_50m.yaml --data data/results --output rows.jsonl --pieces rates

A plan (launch/plans/) lists runs as grids of settings, in pieces. Each run is trained (megatron_tn.train), evaluated on
the held-out text (megatron_tn.evaluate; a plan may add evaluations), and a row is appended to --output; runs that have
a row there are not run again, and a stopped one goes on from its checkpoint in --runs. With `held_out: curve` in the
plan, the last evaluation of the training is the row's figure instead. A grid with settings benchmark.* is measured
(megatron_tn.benchmark), one run at a time: the speed of runs side by side says nothing.
Words after -- are overrides of every run. Exit code 1 when a run fails, 3 when --minutes ended before the runs did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kernels.bench import rows
from launch.runs import Failed, Programs, TimeUp
from megatron_tn.training.run_folder import RunFolder

FAILED, TIME_UP = 1, 3
# Evaluations of every run: name -> settings of megatron_tn.evaluate. Of the held-out text in pieces, whose figure is
# the row's, and of whole documents, equally many of each source where it has them.
OF_ALL = {
    "pieces": {"split": "pieces", "batch_tokens": 65536},
    "heldout": {"split": "heldout", "batch_tokens": 16384, "max_document_tokens": 131072, "max_documents": 240},
}
HELD_OUT = ("evaluate", "curve")  # `held_out` of a plan; the first is the default, "curve": without OF_ALL
SPLITS = ("train", "heldout", "pieces")  # of --data
REPORT_S = 20.0  # between two lines on the runs under way
BEST = re.compile(r"best of (\w+)(?: (\S+))?")  # model, and variant
RESULT, LOOP = "result", "training loop"  # names of the rows of a trained and of a measured run

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run of a plan: settings that all runs share, its own, the folder of all runs, and its evaluations."""

    plan: str
    shared: dict[str, Any]
    own: dict[str, Any]
    runs: Path
    evaluations: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return ",".join(str(value) if key == "model" else f"{key}={value}" for key, value in self.own.items())

    @property
    def variant(self) -> str:
        """What sets the run apart beside its model, peak rate and seed."""
        return ",".join(f"{value}" for key, value in self.own.items() if key not in ("model", "optim.lr", "seed"))

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.runs / self.name.replace("/", "-"))

    @property
    def is_benchmark(self) -> bool:
        return any(key.startswith("benchmark.") for key in self.own)

    def has_row(self, known: list[Row], overrides: list[str]) -> bool:
        """Whether one of the rows is this run's. overrides: settings that this call adds to every run."""
        if self.is_benchmark:
            asked = {f"{key}={value}" for key, value in (self.shared | self.own).items()}
            return any(row["name"] == LOOP and asked == settings_of(row) - set(overrides) for row in known)
        return any(row["name"] == RESULT and (row["plan"], row["run"]) == (self.plan, self.name) for row in known)

    def measure(self, programs: Programs, options: argparse.Namespace) -> None:
        """Appends the rows of megatron_tn.benchmark to the output. Raises Failed and TimeUp."""
        words = [f"{key}={value}" for key, value in (self.shared | self.own).items()]
        words += [f"run_dir={self.folder.path}", f"benchmark.output={options.output}", *options.overrides]
        programs.run("megatron_tn.benchmark", words, self.folder.path / "console.log")

    def finish(self, programs: Programs, options: argparse.Namespace, gpu: str | None) -> Row:
        """Trains, or goes on training, and evaluates, on one GPU; returns the row. Raises Failed and TimeUp."""
        folder = self.folder.path
        words = [f"{key}={value}" for key, value in (self.shared | self.own).items()] + [f"run_dir={folder}"]
        manifests = {split: options.data / split / "manifest.json" for split in SPLITS}
        words += [f"data.manifest={manifests['train']}", f"evaluation.manifest={manifests['pieces']}"]
        programs.run("megatron_tn.train", [*words, *options.overrides], folder / "console.log", gpu)
        found = {}
        for name, settings in self.evaluations.items():
            output, settings = folder / f"{name}.json", dict(settings)
            words = [f"checkpoint={folder}", f"manifest={manifests[settings.pop('split')]}", f"output={output}"]
            if options.documents:
                settings["max_documents"] = options.documents
            words += [f"{key}={value}" for key, value in settings.items()]
            programs.run("megatron_tn.evaluate", words, folder / "console.log", gpu)
            found[name] = json.loads(output.read_text())
        return self._row(found, -(-options.at_once // len(options.gpus or [0])))

    def _row(self, found: dict[str, Row], at_once: int) -> Row:
        """found: results of self.evaluations. at_once: runs that shared a GPU. Raises Failed."""
        config, losses = self.folder.frozen_config(), self.folder.records("loss")
        memory = [record["memory/allocated_gib"] for record in self.folder.records("memory/allocated_gib")]
        curve = [(record["step"], record["heldout_bits_per_byte"]) for record in self.folder.records("heldout_loss")]
        tokens = {record["step"]: record["tokens"] for record in losses}
        figures = {
            "peak_gib": max(memory, default=None),
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in losses),
            "at_once": at_once,
            # Million training tokens and held-out bits per byte of evaluation.max_documents pieces, in order.
            "curve": " ".join(f"{tokens[step] / 1e6:.3f}:{value:.4f}" for step, value in curve if step in tokens),
        }
        ended = max(record["step"] for record in self.folder.records())
        value = dict(curve).get(ended)
        if value is None and "pieces" not in found:
            raise Failed(
                f"{self.name}: stopped within the evaluation after its last step, {ended}, which is the row's figure "
                f"with held_out: curve: remove {self.folder} to train it again"
            )
        for name, of in found.items():
            bits, own = of["bits_per_byte"], self.evaluations[name]
            if name == "pieces":
                value = bits["model"]
                figures |= {"heldout_tokens": of["tokens"], "heldout_bytes": of["text_bytes"]}
                figures |= {"gzip": bits["gzip -9"], "xz": bits["xz -9"]} | by_part("sources", of["sources"])
            elif name == "heldout":
                figures |= {"whole": bits["model"]} | by_part("positions", of["positions"])
            else:
                figures[name] = bits["model"]
                figures |= by_part(name, of["positions"]) if "sequence_tokens" in own else {}
        return rows.row(
            RESULT,
            "bits/byte",
            value,
            plan=self.plan,
            run=self.name,
            variant=self.variant,
            model=config.model.name,
            lr=config.optim.lr,
            seed=config.seed,
            steps=losses[-1]["step"],
            tokens=losses[-1]["tokens"],
            sequence_length=config.data.sequence_length,
            global_batch=config.data.global_batch,
            **figures,
        )


def by_part(kind: str, parts: dict[str, Row]) -> Row:
    """Bits per byte of each source, or from each position on."""
    return {f"{kind}/{name}": part.get("bits_per_byte") for name, part in parts.items()}


def settings_of(row: Row) -> set[str]:
    """KEY=VALUE of a benchmark's command line, but for the places that it writes to."""
    words = {word for word in shlex.split(row["command"]) if "=" in word}
    return {word for word in words if not word.startswith(("run_dir=", "benchmark.output="))}


class Bad(Exception):
    """A plan that cannot be run; the message is one line."""


def read_plan(path: Path) -> dict[str, Any]:
    """{"settings": {...}, "pieces": {name: [grid]}, "evaluations": {name: {"split": ..., setting: value}}}, OF_ALL
    among these unless the plan says `held_out: curve`. Raises Bad."""
    try:
        plan = yaml.safe_load(path.read_text())
        grids = [grid for piece in plan["pieces"].values() for grid in piece]
        ok = all(isinstance(values, list) for grid in grids for values in grid.values())
        evaluations, held_out = plan.get("evaluations", {}), plan.get("held_out", HELD_OUT[0])
        plan["evaluations"] = (OF_ALL if held_out == HELD_OUT[0] else {}) | evaluations
        unknown = [name for name, settings in evaluations.items() if settings.get("split") not in SPLITS]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise Bad(f"{path}: no plan: {' '.join(str(error).split())}") from None
    if not ok:
        raise Bad(f"{path}: each setting of a grid needs a list of values")
    if held_out not in HELD_OUT:
        raise Bad(f"{path}: held_out: {held_out} must be one of {', '.join(HELD_OUT)}")
    if unknown:
        raise Bad(f"{path}: evaluations.{unknown[0]}.split must be one of {', '.join(SPLITS)}")
    return plan


def grid_runs(grid: dict[str, list[Any]], done: list[Row]) -> Iterator[dict[str, Any]]:
    """The settings of each run of a grid; `done`: rows from which "best of MODEL" is read. Raises Bad."""
    for values in itertools.product(*grid.values()):
        yield {key: _resolved(key, value, done) for key, value in zip(grid, values, strict=True)}


def _resolved(key: str, value: Any, done: list[Row]) -> Any:
    if not (wanted := BEST.fullmatch(str(value))):
        return value
    column = key.rpartition(".")[2]
    asked = (RESULT, wanted[1], wanted[2] or "")
    found = [row for row in done if (row["name"], row.get("model"), row.get("variant", "")) == asked]
    if not found:
        raise Bad(f"{key}={value}: no run of {wanted[0].removeprefix('best of ')} has a row yet")
    return min(found, key=lambda row: row["value"])[column]


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_piece(grids: list[dict], plan: dict, options: argparse.Namespace, programs: Programs) -> None:
    """Runs what has no row yet. Raises Bad, Failed and TimeUp."""
    known = read_rows(options.output)
    chosen = [own for grid in grids for own in grid_runs(grid, known)]
    runs = [Run(options.plan.stem, plan["settings"], own, options.runs, plan["evaluations"]) for own in chosen]
    once = {run.name: run for run in runs}.values()  # the best rate may be one that the piece lists, too
    left = [run for run in once if not run.has_row(known, options.overrides)]
    train([run for run in left if not run.is_benchmark], options, programs)
    for run in left:
        if run.is_benchmark:
            say(f"{run.name}: measured")
            run.measure(programs, options)


def train(runs: list[Run], options: argparse.Namespace, programs: Programs) -> None:
    """Finishes the runs, options.at_once at a time, with a line on each of them now and then; appends their rows.
    Raises Failed and TimeUp."""
    writing, under_way = threading.Lock(), {}
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for _, gpu in zip(range(options.at_once), itertools.cycle(options.gpus or [None])):
        free.put(gpu)

    def task(run: Run) -> None:
        under_way[run.name] = run
        say(f"{run.name}: begins")
        gpu = free.get_nowait()
        try:
            row = run.finish(programs, options, gpu)
        finally:
            del under_way[run.name]
            free.put(gpu)
        with writing:
            rows.append(options.output, [row])
        say(f"{run.name}: {row['value']:.4f} bits per byte, {row['tokens_per_second']:,.0f} tokens/s")

    ended = threading.Event()

    def report() -> None:
        while not ended.wait(REPORT_S):
            for run in list(under_way.values()):
                if records := run.folder.records("loss"):
                    say(f"  {run.name}: step {records[-1]['step']}, loss {records[-1]['loss']:.3f}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        programs.side_by_side([lambda run=run: task(run) for run in runs], options.at_once)
    finally:
        ended.set()
        reporter.join()


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, required=True, help="a YAML file such as launch/plans/results_50m.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder that data_pipeline.corpus.join wrote")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file that rows are appended to")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder of the runs' own folders")
    parser.add_argument("--pieces", nargs="+", metavar="PIECE", help="of the plan, in order; default: all")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, of all GPUs (default 1)")
    parser.add_argument("--gpus", nargs="+", metavar="INDEX", help="runs take these in turn; default: the first")
    parser.add_argument(
        "--documents", type=int, default=0, help="held-out documents and pieces that are evaluated; 0: all"
    )
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run, after --")
    options = parser.parse_args(arguments)
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once} must be at least 1")
    programs = Programs(None if options.minutes is None else time.monotonic() + 60 * options.minutes)
    try:
        plan = read_plan(options.plan)
        if unknown := sorted(set(options.pieces or ()) - set(plan["pieces"])):
            raise Bad(f"--pieces {unknown[0]}: {options.plan} has {', '.join(plan['pieces'])}")
        for split in SPLITS:
            if not (path := options.data / split / "manifest.json").is_file():
                raise Bad(f"--data {options.data}: no {path}; python -m data_pipeline.corpus.join makes it")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        for piece in options.pieces or plan["pieces"]:
            say(f"piece {piece}")
            run_piece(plan["pieces"][piece], plan, options, programs)
    except Bad as bad:
        parser.error(str(bad))
    except Failed as failed:
        say(str(failed))
        return FAILED
    except TimeUp:
        say("time is up: the same command goes on from here")
        return TIME_UP
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
