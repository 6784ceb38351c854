"""Rounds of self-cleaning (arXiv 2307.14995, section 4): train a model on the current corpus, score every document with
it, keep the band between two quantiles per source and language, have people judge a sample, and repeat.

Shards are never rewritten: a round writes a filter, which the next round's training and the final training use. Each
step writes a file when done, so that a killed run continues; the trainer and the scorer are separate programs that
resume by themselves.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.audit.agreement import decisions, wilson
from data_pipeline.audit.answers import AnswersFile
from data_pipeline.audit.draw import draw, group_scores
from data_pipeline.audit.samples import Samples, write_samples
from data_pipeline.config import keep_settings
from data_pipeline.errors import InputError, StageError
from data_pipeline.files import open_lock, replace_file
from data_pipeline.redaction import redacted, storable, written
from data_pipeline.selfclean.bands import Quantiles, choose_bands
from data_pipeline.selfclean.settings import RoundsSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.count import count
from data_pipeline.stream.score_filter import ScoreFilter
from data_pipeline.words import value

STEP = 1.5  # factor on a tail's quantile after human verdicts
FEWEST = 8  # minimum of decided documents in a tail to change its quantile


class WaitingForPeople(Exception):
    """The sample of a round is not judged yet. The message says how to judge it and how to continue."""


def run_rounds(settings: RoundsSettings) -> list[dict]:
    """Runs all rounds that are not done; returns all rounds' reports. Raises InputError, StageError when training or
    scoring fails, and WaitingForPeople."""
    manifest = Manifest.load(settings.manifest)
    sources = sorted({shard.source for shard in manifest.shards})
    if unknown := sorted(set(settings.quantiles.sources) - set(sources)):
        raise InputError(f"quantiles.sources={', '.join(unknown)}: no such source; there are {', '.join(sources)}")
    decisive = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE}
    keep_settings(settings.output, decisive | {"manifest_hash": manifest.content_hash}, "rounds")
    reports, before = [], None
    quantiles = settings.quantiles
    with _exclusive(Path(settings.output)) as lock:
        for number in range(1, settings.rounds + 1):
            one = Round(settings, manifest, number, quantiles, before)
            if not one.report.exists():
                if problems := manifest.score_problems(f"manifest={settings.manifest}"):
                    raise InputError(*problems)
                one.run(lock)
            reports.append(json.loads(one.report.read_text()))
            if number < settings.rounds:
                if settings.audit == "wait" and settings.each:
                    one.wait()
                quantiles = one.next_quantiles()
            before = one
    return reports


@contextlib.contextmanager
def _exclusive(output: Path) -> Iterator[IO]:
    """Locks `output` for this process and for child processes that inherit the lock: a trainer may outlive this
    process, and a second trainer must not write to the same run."""
    with open_lock(output / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"output={output} is locked by another process, or by the trainer of a killed one: wait for its end"
            ) from None
        yield lock


# Settings that may change between two starts; the others determine the results of completed steps.
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
        self.settings = settings
        self.manifest = manifest
        self.number = number
        self.quantiles = quantiles
        self.before = before
        self.folder = Path(settings.output) / f"round_{number:02d}"
        self.filter = self.folder / "filter.json"
        self.samples = self.folder / "samples.jsonl"
        self.report = self.folder / "report.json"

    @property
    def scores(self) -> str:
        """Name of the scores, unique to the corpus, the previous round's filter and the training settings."""
        previous = ScoreFilter.load(str(self.before.filter)).filter_hash if self.before else ""
        parts = [
            self.manifest.content_hash,
            previous,
            self.settings.evaluation_model,
            self.settings.train,
            self.settings.trainer[1:],
        ]
        return f"round{self.number}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"

    def run(self, lock: IO) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Everybody on the machine may read a program's arguments: it resolves variables itself.
        manifest = f"manifest={value(written(self.settings.manifest))}"
        run_dir = self.folder / "train"
        words = [f"model={self.settings.evaluation_model}", f"data.{manifest}", f"run_dir={value(str(run_dir))}"]
        if self.before:
            words.append(f"data.filter={value(str(self.before.filter))}")
        self._program("train", [*self.settings.trainer, *words, *self.settings.train], lock)
        words = [f"checkpoint={value(str(run_dir))}", manifest, f"name={self.scores}", *self.settings.score]
        self._program("score", [*self.settings.scorer, *words], lock)
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

    def _program(self, name: str, command: list[str], lock: IO) -> None:
        done = self.folder / f"{name}.done"
        if done.exists():
            return
        print(redacted(f"round {self.number}: {shlex.join(command)}"), flush=True)
        finished = subprocess.run(command, check=False, pass_fds=(lock.fileno(),))
        if finished.returncode:
            raise StageError(
                f"round {self.number}: {name} ended with exit code {finished.returncode}; see its output above; the "
                "same command continues from here"
            )
        replace_file(done, json.dumps(storable(command)).encode() + b"\n")

    def _figures(self, chosen: ScoreFilter, counts) -> dict:
        """[kept, all] documents and tokens of every source, the bands, and their quantiles."""
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
        """Raises WaitingForPeople while any sample has no answer."""
        samples = Samples.load(str(self.samples)).entries
        left = len(samples) - len(decisions(samples, self._answers()))
        if left:
            raise WaitingForPeople(
                f"round {self.number}: {left} of {len(samples)} documents are not judged yet. Judge them with\n"
                f"  python -m data_pipeline.audit samples={shlex.quote(str(self.samples))}\n"
                "then start this command again; audit=skip continues without verdicts."
            )

    def _answers(self):
        return AnswersFile(self.samples.with_name("samples.answers.jsonl")).all()

    def next_quantiles(self) -> Quantiles:
        """The next round's quantiles, from the human verdicts on this round's drops, tail by tail.

        Precision of a tail: the share of its decided documents that people would drop, too, with Wilson's interval. If
        the interval lies above settings.precision, the tail grows by STEP, to at most 0.45; if below, it shrinks by
        STEP; otherwise, or with fewer than FEWEST documents, it stays.
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
    """A rich table: documents and tokens that each round keeps of each source, and the source's band."""
    from rich.table import Table

    shown = Table("round", "source", "documents kept", "tokens kept", "band")
    for report in reports:
        bands = report["filter"]["bands"]
        for source, found in report["kept_of"].items():
            low, high = bands.get(source, report["filter"]["default"])
            shares = [f"{kept} of {there} ({100 * kept / max(there, 1):.1f} %)" for kept, there in found.values()]
            shown.add_row(str(report["round"]), source, *shares, f"{low:.3f} .. {high:.3f}")
    return shown
