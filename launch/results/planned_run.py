"""A run of a plan (run_plan.py): its command line, its duration, and its row of figures."""

import argparse
import json
import math
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.bench import rows
from launch.results.run_plan import OF_ALL, RESULT, SPLITS, Row
from launch.results.runs import Failed, Programs, TimeUp
from megatron_tn.config import differences, replacing
from megatron_tn.training.run_folder import RunFolder

BEGUN_WITH = "begun_with.json"  # in a run's folder: the words of `Run._words` of the last start
LOOP = "training loop"  # name of the row of a measured run


@dataclass(frozen=True)
class Run:
    """A run of a plan: settings that all runs share, its own, the folder of all plans' runs, and its evaluations."""

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
        return RunFolder(self.runs / self.plan / self.name.replace("/", "-"))

    @property
    def is_benchmark(self) -> bool:
        return any(key.startswith("benchmark.") for key in self.own)

    def has_row(self, known: list[Row], overrides: list[str]) -> bool:
        """Whether one of the rows is this run's. overrides: settings that this call adds to every run."""
        if self.is_benchmark:
            asked = {*words_of(self.shared | self.own)} - set(overrides)
            return any(row["name"] == LOOP and asked == settings_of(row) - set(overrides) for row in known)
        return any(row["name"] == RESULT and (row["plan"], row["run"]) == (self.plan, self.name) for row in known)

    def seconds_left(self, known: list[Row], at_once: int) -> float | None:
        """Estimated seconds until the run is done: those of the last row of a run on the same machine that differs in
        peak rate and seed alone, less the share of steps that the checkpoint has. None without such a row. at_once: see
        `_row`."""
        asked = {"name": RESULT, "plan": self.plan, "at_once": at_once, "gpu": rows.provenance()["gpu"]}
        like = [row for row in known if asked.items() <= row.items() and _kind(row["run"]) == _kind(self.name)]
        if not like:
            return None
        whole = like[-1].get("seconds") or like[-1]["tokens"] / like[-1]["tokens_per_second"]
        saved = max(self.folder.saved(), default=0)
        return whole * (1 - saved / self.folder.frozen_config().schedule.steps) if saved else whole

    def measure(self, programs: Programs, options: argparse.Namespace) -> None:
        """Appends the rows of megatron_tn.benchmark to the output. Raises Failed and TimeUp."""
        words = words_of(self.shared | self.own)
        words += [f"run_dir={self.folder.path}", f"benchmark.output={options.output}", *options.overrides]
        programs.run("megatron_tn.benchmark", words, self.folder.path / "console.log")

    def finish(self, programs: Programs, options: argparse.Namespace, gpu: str | None) -> Row:
        """Trains, or goes on training, and evaluates, on one GPU; returns the row. Raises Failed and TimeUp."""
        folder, began, is_new = self.folder.path, time.monotonic(), not self.folder.is_there
        manifests = {split: options.data / split / "manifest.json" for split in SPLITS}
        words = words_of({"run_dir": folder, "data.manifest": manifests["train"]})
        words += [f"evaluation.manifest={manifests['pieces']}", *self._words(options)]
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / BEGUN_WITH) as file:
            file.write(json.dumps(self._words(options)) + "\n")
        programs.run("megatron_tn.train", words, folder / "console.log", gpu)
        if self.folder.status().get("state") == "preempted":
            if programs.left() == 0:
                raise TimeUp
            raise Failed(f"{self.name}: told to stop at step {self.folder.status()['step']}")
        evaluations, found = self.evaluations, {}
        if self.is_read_from_curve and self._ended() not in self._curve():  # stopped within its last evaluation
            most = self.folder.frozen_config().evaluation.max_documents
            evaluations = evaluations | {"pieces": OF_ALL["pieces"] | {"max_documents": most}}
        for name, settings in evaluations.items():
            output, settings = folder / f"{name}.json", dict(settings)
            words = [f"checkpoint={folder}", f"manifest={manifests[settings.pop('split')]}", f"output={output}"]
            if options.documents:
                settings["max_documents"] = options.documents
            words += words_of(settings)
            programs.run("megatron_tn.evaluate", words, folder / "console.log", gpu)
            found[name] = json.loads(output.read_text())
        return self._row(found, runs_per_gpu(options), time.monotonic() - began if is_new else None)

    def changed(self, options: argparse.Namespace) -> str:
        """One line where the run has a checkpoint, and was begun with other settings than this call gives it: it would
        go on with these, and its row would say nothing of the others."""
        file = self.folder.path / BEGUN_WITH
        if not self.folder.saved() or not file.is_file():
            return ""
        before, now = (_last_of(words) for words in (json.loads(file.read_text()), self._words(options)))
        if not (found := differences(before, now)):
            return ""
        return f"{self.folder} was begun with other settings ({'; '.join(found)}): give those, or move the folder away"

    def _words(self, options: argparse.Namespace) -> list[str]:
        """KEY=VALUE of the training's settings: the plan's and this call's, but for the places of files."""
        settings = self.shared | self.own
        if options.documents and self.is_read_from_curve:
            settings |= {"evaluation.max_documents": options.documents}
        return [*words_of(settings), *options.overrides]

    @property
    def is_read_from_curve(self) -> bool:
        """Whether the last evaluation of the training is the row's figure."""
        return "pieces" not in self.evaluations

    def _curve(self) -> dict[int, float]:
        """Step -> held-out bits per byte of the training's evaluations, in order."""
        records = self.folder.records("heldout_loss")
        return {record["step"]: comparable(record["heldout_bits_per_byte"]) for record in records}

    def _ended(self) -> int:
        """The last step of the run so far."""
        return max(record["step"] for record in self.folder.records())

    def _row(self, found: dict[str, Row], at_once: int, seconds: float | None) -> Row:
        """The row of the finished run. found: results of evaluations. at_once: runs that shared a GPU. seconds: that
        training and evaluations took; None: not known, since an earlier call began the training."""
        config, losses = self.folder.frozen_config(), self.folder.records("loss")
        memory = [record["memory/allocated_gib"] for record in self.folder.records("memory/allocated_gib")]
        curve, ended = self._curve(), self._ended()
        tokens = {record["step"]: record["tokens"] for record in self.folder.records("tokens")}  # skipped steps, too
        if self.is_read_from_curve and "pieces" in found:
            curve[ended] = comparable(found["pieces"]["bits_per_byte"]["model"])
        value = curve.get(ended)
        figures = {
            "peak_gib": max(memory, default=None),
            "tokens_per_second": statistics.median(record["tokens_per_second"] for record in losses),
            "at_once": at_once,
            "seconds": seconds,
            # Million training tokens and held-out bits per byte of evaluation.max_documents pieces, in order.
            "curve": " ".join(
                f"{tokens[step] / 1e6:.3f}:{value:.4f}" for step, value in curve.items() if step in tokens
            ),
        }
        for name, of in found.items():
            bits = of["bits_per_byte"]
            if name == "pieces":
                value = comparable(bits["model"])
                figures |= {"heldout_tokens": of["tokens"], "heldout_bytes": of["text_bytes"]}
                figures |= {"gzip": bits["gzip -9"], "xz": bits["xz -9"]} | by_part("sources", of["sources"])
            elif name == "heldout":
                figures |= {"whole": bits["model"]} | by_part("positions", of["positions"])
            else:
                figures[name] = bits["model"]
                figures |= by_part(name, of["positions"]) if "sequence_tokens" in self.evaluations[name] else {}
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


def comparable(bits: float | None) -> float:
    """Bits per byte of a model; of one that diverged infinity, for NaN and for the journal's null."""
    return bits if bits is not None and math.isfinite(bits) else math.inf


def words_of(settings: dict[str, Any]) -> list[str]:
    """KEY=VALUE of each setting, for a command line."""
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def _last_of(words: list[str]) -> dict[str, str]:
    """Setting -> its value, of several the last one's."""
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def by_part(kind: str, parts: dict[str, Row]) -> Row:
    """Bits per byte of each source, or from each position on."""
    return {f"{kind}/{name}": part.get("bits_per_byte") for name, part in parts.items()}


def settings_of(row: Row) -> set[str]:
    """KEY=VALUE of a benchmark's command line, but for the places that it writes to."""
    words = {word for word in shlex.split(row["command"]) if "=" in word}
    return {word for word in words if not word.startswith(("run_dir=", "benchmark.output="))}


def _kind(name: str) -> str:
    """A run's name without peak rate and seed, which change nothing of the time that it takes."""
    return ",".join(part for part in name.split(",") if not part.startswith(("optim.lr=", "seed=")))


def runs_per_gpu(options: argparse.Namespace) -> int:
    return -(-options.at_once // len(options.gpus or [0]))
