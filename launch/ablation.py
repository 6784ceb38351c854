"""Data ablation of cleaning: held-out perplexity of equal models trained on the corpora of `data_pipeline.ablation`.

    python -m data_pipeline.ablation output=runs/ablation/corpora
    python -m launch.ablation --corpora runs/ablation/corpora --run-dir runs/ablation --seeds 3 --at-once 3

trains experiment=ablation for each corpus and seed (megatron_tn.train), evaluates each model on held-out documents that
are in no corpus and were not cleaned (megatron_tn.evaluate), and writes summary.json and ablation.png to the run's
folder. Further arguments are overrides for training. Completed models are not trained again. Exit code 1 when a run
fails; the message names its log, with its last lines.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.results.runs import Failed, Programs
from megatron_tn.training.curve import draw
from megatron_tn.training.run_folder import RunFolder

console = Console(highlight=False)


# Settings of the scoring model in a round of self-cleaning: less than one epoch of the cleaned corpus's 6 M tokens.
EVALUATION_MODEL = ("experiment=ablation", "schedule.steps=300", "evaluation.every=0")


@dataclass(frozen=True)
class Arm:
    """An arm of the ablation: a corpus, with or without a filter."""

    name: str
    manifest: Path
    filter: Path | None = None


@dataclass(frozen=True)
class Run:
    """The run of one arm and seed, with its folder."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def evaluation(self) -> Path:
        """The output file of `megatron_tn.evaluate`."""
        return self.folder / "evaluation.json"

    def finish(self, programs: Programs, heldout: Path, overrides: list[str]) -> None:
        """Trains (or resumes) and evaluates, unless this is already done. Raises Failed."""
        if self.evaluation.exists():
            return
        words = ["experiment=ablation", f"seed={self.seed}", f"run_dir={self.folder}"]
        words += [f"data.manifest={self.arm.manifest}", f"evaluation.manifest={heldout}"]
        words += [f"data.filter={self.arm.filter}"] if self.arm.filter else []
        log = self.folder / "console.log"
        programs.run("megatron_tn.train", [*words, *overrides], log)
        # As many tokens per evaluation batch as per training step, so that evaluation needs no more memory.
        words = [f"checkpoint={self.folder}", f"manifest={heldout}", f"output={self.evaluation}", "batch_tokens=16384"]
        programs.run("megatron_tn.evaluate", words, log)
        console.print(f"{self.arm.name}, seed {self.seed}: {perplexity(self):.3f} held-out perplexity")

    def figures(self) -> dict[str, Any]:
        return json.loads(self.evaluation.read_text())

    def records(self, key: str) -> list[dict[str, Any]]:
        """The records of the run's journal that have `key`."""
        return RunFolder(self.folder).records(key)


def self_clean(programs: Programs, cleaned: Path, folder: Path, overrides: list[str]) -> Arm:
    """The cleaned corpus after one round of self-cleaning by a model of the same shape. Raises Failed."""
    arm = Arm("selfcleaned", cleaned, folder / "round_01/filter.json")
    if not arm.filter.with_name("report.json").exists():
        train = f"train={json.dumps([*EVALUATION_MODEL, *overrides])}"
        words = [f"manifest={cleaned}", f"output={folder}", "rounds=1", "each=0", "evaluation_model=20m", train]
        programs.run("data_pipeline.selfclean", words, folder / "console.log")
    return arm


def perplexity(run: Run) -> float:
    """Perplexity per token of the held-out documents."""
    return math.exp(run.figures()["nats_per_token"])


def summarise(corpora: dict[str, Any], runs: list[Run], overrides: list[str]) -> dict[str, Any]:
    """For each arm: perplexity and bits per byte by seed, their means, the standard deviation over seeds, and the
    relative difference of mean perplexity from the first arm's."""
    summary: dict[str, Any] = {"arms": {}, "overrides": overrides, "text": corpora}
    first: list[float] = []
    for name in dict.fromkeys(run.arm.name for run in runs):
        own = [run for run in runs if run.arm.name == name]
        perplexities = [perplexity(run) for run in own]
        bits = [run.figures()["bits_per_byte"]["model"] for run in own]
        first = first or perplexities
        summary["arms"][name] = {
            "seeds": [run.seed for run in own],
            "trained_tokens": [max(record["tokens"] for record in run.records("tokens")) for run in own],
            "perplexity": perplexities,
            "bits_per_byte": bits,
            "mean_perplexity": statistics.mean(perplexities),
            "mean_bits_per_byte": statistics.mean(bits),
            "stdev_perplexity": statistics.stdev(perplexities) if len(own) > 1 else None,
            "perplexity_less_than_first": 1 - statistics.mean(perplexities) / statistics.mean(first),
        }
        if filter := own[0].arm.filter:
            summary["arms"][name]["self_cleaning"] = json.loads(filter.with_name("report.json").read_text())
    return summary


def show(summary: dict[str, Any]) -> None:
    table = Table("trained on", "perplexity by seed", "mean", "bits per byte", title="held-out clean text")
    for name, found in summary["arms"].items():
        seeds = " ".join(f"{value:.3f}" for value in found["perplexity"])
        table.add_row(name, seeds, f"{found['mean_perplexity']:.3f}", f"{found['mean_bits_per_byte']:.4f}")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, required=True, help="folder that data_pipeline.ablation wrote")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of the runs and their summary")
    parser.add_argument("--seeds", type=int, default=3, help="models trained on each corpus (default 3)")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side on this machine (default 1)")
    parser.add_argument(
        "--selfclean", action="store_true", help="a third arm: the cleaned corpus after one round of self-cleaning"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings added to every run, such as schedule.steps=200"
    )
    options = parser.parse_args(arguments)
    description = options.corpora / "corpora.json"
    if not description.is_file():
        parser.error(
            f"--corpora {options.corpora}: no corpora.json; python -m data_pipeline.ablation output=... makes it"
        )
    for name in ("seeds", "at_once"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    corpora = json.loads(description.read_text())
    # Completed runs are reused, so they must have had the same corpora and overrides.
    question = {"corpora": corpora, "overrides": options.overrides}
    asked = options.run_dir / "question.json"
    if asked.exists() and json.loads(asked.read_text()) != question:
        parser.error(f"--run-dir {options.run_dir} holds runs on other corpora or with other overrides: choose another")
    options.run_dir.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(question, indent=1) + "\n")
    arms = [Arm(name, options.corpora / name / "manifest.json") for name in corpora["corpora"]]
    heldout = options.corpora / "heldout/manifest.json"
    overrides = [f"model.vocab_size={corpora['vocab_size']}", *options.overrides]
    programs = Programs()
    try:
        if options.selfclean:
            arms.append(self_clean(programs, arms[-1].manifest, options.run_dir / "selfclean", overrides))
        runs = [Run(arm, seed, options.run_dir / f"{arm.name}-{seed}") for seed in range(options.seeds) for arm in arms]
        tasks = [partial(run.finish, programs, heldout, overrides) for run in runs]
        programs.side_by_side(tasks, options.at_once)
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    summary = summarise(corpora, runs, options.overrides)
    (options.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary)
    names = dict.fromkeys(run.arm.name for run in runs)
    arms_of = {name: [RunFolder(run.folder) for run in runs if run.arm.name == name] for name in names}
    draw(arms_of, options.run_dir / "ablation.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
