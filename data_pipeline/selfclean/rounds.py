"""Rounds of self-cleaning (arXiv 2307.14995, section 4): train a model on the corpus as it stands, score every document
with it, keep the band between two quantiles of each source and language, have people judge a sample, and again.

Shards are never rewritten: a round leaves a filter, which the next round's training and the final one read. Each step
leaves a file that means it is done, so that a killed run goes on where it was; the trainer and the scorer, programs of
their own, resume by themselves.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.audit.agreement import decisions, wilson
from data_pipeline.audit.answers import read_answers
from data_pipeline.audit.draw import draw, group_scores
from data_pipeline.audit.samples import Samples, write_samples
from data_pipeline.config import keep_settings
from data_pipeline.errors import InputError, StageError
from data_pipeline.files import open_lock, replace_file
from data_pipeline.selfclean.bands import Quantiles, choose_bands
from data_pipeline.selfclean.settings import RoundsSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.count import count
from data_pipeline.stream.score_filter import ScoreFilter

STEP = 1.5  # by which a tail's quantile grows or shrinks after people judged it
FEWEST = 8  # decided documents of a tail before they move its quantile


class WaitingForPeople(Exception):
    """The sample of a round is not judged yet. The message says how to do it and how to go on."""


def run_rounds(settings: RoundsSettings, say=print) -> list[dict]:
    """All rounds that are not done; returns every round's report. Raises InputError, StageError when training or
    scoring fails, and WaitingForPeople."""
    manifest = Manifest.load(settings.manifest)
    sources = sorted({shard.source for shard in manifest.shards})
    if unknown := sorted(set(settings.quantiles.sources) - set(sources)):
        raise InputError(f"quantiles.sources={', '.join(unknown)}: no such source; there are {', '.join(sources)}")
    decisive = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    keep_settings(settings.output, decisive | {"manifest_hash": manifest.content_hash}, "rounds")
    reports, before = [], None
    quantiles = Quantiles(**dataclasses.asdict(settings.quantiles))
    with _exclusive(Path(settings.output)) as lock:
        for number in range(1, settings.rounds + 1):
            one = Round(settings, manifest, number, quantiles, before)
            if not one.report.exists():
                one.run(say, lock)
            reports.append(json.loads(one.report.read_text()))
            if number < settings.rounds:
                if settings.audit == "wait" and settings.each:
                    one.wait()
                quantiles = one.next_quantiles()
            before = one
    return reports


@contextlib.contextmanager
def _exclusive(output: Path) -> Iterator[IO]:
    """Holds `output` for this process and for those that the lock is handed to: a trainer outlives a killed start, and
    a second one must not write to the same run."""
    with open_lock(output / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"output={output}: another start, or what a killed one began, is still at work") from None
        yield lock


# What may change between two starts; everything else decides what was done already.
FREE = ("rounds", "audit", "score", "trainer", "scorer", "manifest", "output")


class Round:
    """One round, in its folder: train/, filter.json, samples.jsonl, report.json."""

    def __init__(
        self,
        settings: RoundsSettings,
        manifest: Manifest,
        number: int,
        quantiles: Quantiles,
        before: "Round | None",
    ):
        self.settings, self.manifest, self.number, self.quantiles, self.before = (
            settings,
            manifest,
            number,
            quantiles,
            before,
        )
        self.folder = Path(settings.output) / f"round_{number:02d}"
        self.filter = self.folder / "filter.json"
        self.samples = self.folder / "samples.jsonl"
        self.report = self.folder / "report.json"

    @property
    def scores(self) -> str:
        """The scores' name: another one for every corpus, filter before and way to train."""
        previous = ScoreFilter.load(str(self.before.filter)).filter_hash if self.before else ""
        parts = [
            self.manifest.content_hash,
            previous,
            self.settings.evaluation_model,
            self.settings.train,
            self.settings.trainer[1:],
        ]
        return f"round{self.number}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    def run(self, say, lock: IO) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = f"manifest={self.settings.manifest}"
        run_dir = self.folder / "train"
        words = [f"model={self.settings.evaluation_model}", f"data.{manifest}", f"run_dir={run_dir}"]
        if self.before:
            words.append(f"data.filter={self.before.filter}")
        self._program("train", [*self.settings.trainer, *words, *self.settings.train], say, lock)
        words = [f"checkpoint={run_dir}", manifest, f"name={self.scores}", *self.settings.score]
        self._program("score", [*self.settings.scorer, *words], say, lock)
        if not self.filter.exists():
            values, _ = group_scores(self.manifest, self.scores, self.settings.measure, lambda *_: None)
            chosen = choose_bands(values, self.quantiles, name=self.scores, measure=self.settings.measure)
            replace_file(self.filter, chosen.to_json().encode() + b"\n")
        chosen = ScoreFilter.load(str(self.filter))
        counts = count(self.manifest, chosen)
        if self.settings.each and not self.samples.exists():
            samples = draw(self.manifest, chosen, each=self.settings.each, seed=self.settings.seed)
            write_samples(self.samples, samples)
        replace_file(self.report, json.dumps(self._figures(chosen, counts), indent=1).encode() + b"\n")

    def _program(self, name: str, command: list[str], say, lock: IO) -> None:
        done = self.folder / f"{name}.done"
        if done.exists():
            return
        say(f"round {self.number}: {' '.join(command)}")
        finished = subprocess.run(command, check=False, pass_fds=(lock.fileno(),))
        if finished.returncode:
            raise StageError(
                f"round {self.number}: {name} ended with exit code {finished.returncode}; its words above say why; the "
                "same command of yours goes on from here"
            )
        replace_file(done, json.dumps(command).encode() + b"\n")

    def _figures(self, chosen: ScoreFilter, counts) -> dict:
        """What stays of every source, the bands, and the quantiles that they came from."""
        sources = {}
        for number, shard in enumerate(self.manifest.shards):
            found = sources.setdefault(shard.source, {"documents": [0, 0], "tokens": [0, 0]})
            for key, kept, there in (
                ("documents", counts.documents, shard.documents),
                ("tokens", counts.tokens, shard.tokens),
            ):
                found[key] = [found[key][0] + int(kept[number]), found[key][1] + there]
        return {
            "round": self.number,
            "scores": self.scores,
            "kept_of": sources,
            "quantiles": dataclasses.asdict(self.quantiles),
            "filter": json.loads(chosen.to_json()),
        }

    def wait(self) -> None:
        """Raises WaitingForPeople while a sample has no answer."""
        samples = Samples.load(str(self.samples)).entries
        left = len(samples) - len(decisions(samples, self._answers()))
        if left:
            raise WaitingForPeople(
                f"round {self.number}: {left} of {len(samples)} documents are not judged yet. Judge them with\n"
                f"  python -m data_pipeline.audit samples={self.samples}\n"
                "then start this command again; audit=skip goes on without."
            )

    def _answers(self):
        path = self.samples.with_name("samples.answers.jsonl")
        return read_answers(path) if path.exists() else []

    def next_quantiles(self) -> Quantiles:
        """The quantiles after what people said of this round's dropped documents, tail by tail.

        Of the documents that the filter dropped on a side and people decided on, the share that they too would drop has
        Wilson's interval. Wholly above settings.precision: the tail may grow, by STEP; wholly below: it must shrink;
        otherwise, or with fewer than FEWEST documents, it stays.
        """
        if not self.samples.exists():
            return self.quantiles
        samples = Samples.load(str(self.samples)).entries
        decided = decisions(samples, self._answers())
        tails = {}
        for side, tail in (("low", self.quantiles.low), ("high", 1 - self.quantiles.high)):
            dropped = [s for s in samples if s.verdict == "drop" and s.place.startswith(side)]
            judged = [decided[s.id] for s in dropped if decided.get(s.id) in ("keep", "drop")]
            estimate = wilson(judged.count("drop"), len(judged)) if len(judged) >= FEWEST else None
            if estimate and estimate.low > self.settings.precision:
                tail *= STEP
            elif estimate and estimate.high < self.settings.precision:
                tail /= STEP
            tails[side] = min(tail, 0.45)
        return dataclasses.replace(self.quantiles, low=tails["low"], high=1 - tails["high"])


def table(reports: list[dict]):
    """What each round keeps, as a rich table."""
    from rich.table import Table

    shown = Table("round", "source", "documents kept", "tokens kept", "band")
    for report in reports:
        bands = report["filter"]["bands"]
        for source, found in report["kept_of"].items():
            low, high = bands.get(source, report["filter"]["default"])
            shares = [f"{kept} of {there} ({100 * kept / max(there, 1):.1f} %)" for kept, there in found.values()]
            shown.add_row(str(report["round"]), source, *shares, f"{low:.3f} .. {high:.3f}")
    return shown
