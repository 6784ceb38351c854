"""Goodput: the share of a run's wall time that went into steps that count, and where the rest went, over all starts.

    goodput = (seconds of useful steps) / (wall seconds)

Computed from the journal's records alone, those of log.superseded.jsonl included: steps that a later start or a rewind
took back. A start is a record with "start/began", the Unix time at which its process began or, for a later job of a
sweep in one process, at which the job before ended. Its last record is the last sign of it: an orderly end or an
exception leaves one with "stop/state", a kill leaves none.
"""

import itertools
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tn.training.run_folder import RunFolder

CAUSES = {
    "startup": "start-up",  # begin of a start to its first step: imports, process groups, model, checkpoint
    "first_step": "first steps",  # what the first step of a start takes beyond a usual one: compilation, warm-up
    "checkpoint": "checkpoint pauses",
    "evaluation": "evaluation",
    "data": "waiting for data",  # of rank 0, in steps that count
    "replayed": "replayed steps",  # trained on again after a failure or a rewind
    "down": "between starts",  # from a start's last record to the next one's begin; not after a finished run
    "other": "other",  # reloading in a rewind, sums and tables at the end
}
BEGAN = time.time()


@dataclass(frozen=True)
class Goodput:
    """wall_s: from the first start's begin to the last record, without the time after a finished run until somebody
    continued it; at least the seconds of steps and pauses, whose clock nobody sets back. useful_s: seconds of steps of
    the journal's curve. steps: of that curve. lost_s: cause of CAUSES -> seconds, at least 0; useful_s and these sum to
    wall_s."""

    wall_s: float
    useful_s: float
    steps: int
    starts: int
    lost_s: dict[str, float]

    @property
    def share(self) -> float:
        """Goodput, 0 to 1."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0

    def values(self) -> dict[str, float]:
        """As values of a journal record."""
        lost = {f"goodput/{cause}_s": seconds for cause, seconds in self.lost_s.items()}
        return {"goodput": self.share, "goodput/wall_s": self.wall_s, "goodput/starts": self.starts} | lost

    def in_words(self) -> str:
        """One line; causes under 0.1 % of the wall time are left out."""
        shares = {cause: seconds / self.wall_s for cause, seconds in self.lost_s.items()} if self.wall_s > 0 else {}
        causes = sorted((cause for cause in shares if shares[cause] >= 1e-3), key=shares.__getitem__, reverse=True)
        lost = ", ".join(f"{CAUSES[cause]} {shares[cause]:.1%}" for cause in causes)
        starts = f"{self.starts} start{'s' if self.starts > 1 else ''}"
        return f"{self.share:.1%} of {self.wall_s:,.0f} s in {starts}" + (f"; lost: {lost}" if lost else "")


@dataclass
class _Start:
    """One start, as its records tell. ready: when its first step began. at: step of the last record that steps are
    counted from. paused: seconds of its checkpoint pauses and evaluations. steps: of each record of a loss: (number of
    steps, their seconds without waits for data, waits for data, whether it counts)."""

    began: float
    ready: float
    at: int
    last: float
    finished: bool = False
    paused: float = 0.0
    steps: list[tuple[int, float, float, bool]] = field(default_factory=list)

    def usual(self) -> list[float]:
        """Seconds a step, of every record but the first."""
        return [seconds / count for count, seconds, _, _ in self.steps[1:]]


def process_began() -> float:
    """Unix time at which this process began; where there is no /proc, at which this module was imported."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return BEGAN
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def goodput_of(folder: RunFolder) -> Goodput | None:
    """The goodput of a run, from its journal so far; None where it has recorded no start."""
    return account(folder.records("time"), folder.superseded("time"))


def account(kept: Iterable[dict[str, Any]], superseded: Iterable[dict[str, Any]]) -> Goodput | None:
    """The goodput that the records tell; None without a record of a start. kept, superseded: records of log.jsonl and
    log.superseded.jsonl."""
    both = [(record, True) for record in kept] + [(record, False) for record in superseded]
    both.sort(key=lambda one: one[0]["time"])
    lost = dict.fromkeys(CAUSES, 0.0)
    starts: list[_Start] = []
    before: dict[str, Any] = {}
    for record, counts in both:
        moment = record["time"]
        if record == before:
            continue  # a kill while records were set aside leaves them in both files, or twice in one
        before = record
        if "start/began" in record:
            starts.append(_Start(record["start/began"], moment, record["step"], moment))
        if not starts:
            continue  # a record from before starts were recorded
        start = starts[-1]
        start.last = moment
        pauses = {"checkpoint": record.get("checkpoint/pause_s", 0.0), "evaluation": record.get("evaluation_s", 0.0)}
        for cause, seconds in pauses.items():
            lost[cause] += seconds
            start.paused += seconds
        if "stop/state" in record:
            start.finished = record["stop/state"] == "finished"
        if "rewind/from" in record:
            start.at = record["step"]
        if "loss" in record and record["step"] > start.at:
            count, start.at = record["step"] - start.at, record["step"]
            data = record.get("data_s", 0.0)
            if not start.steps:
                start.ready = max(start.ready, moment - count * record["step_seconds"] - start.paused)
            start.steps.append((count, count * (record["step_seconds"] - data), count * data, counts))
    return _sum(starts, lost) if starts else None


def _sum(starts: Sequence[_Start], lost: dict[str, float]) -> Goodput:
    useful, steps = 0.0, 0
    everywhere = [seconds for start in starts for seconds in start.usual()]
    for start in starts:
        lost["startup"] += max(start.ready - start.began, 0.0)
        usual = start.usual() or everywhere
        for index, (count, seconds, data, counts) in enumerate(start.steps):
            if not index and usual:
                excess = max(seconds - count * statistics.median(usual), 0.0)
                lost["first_step"] += excess
                seconds -= excess
            if counts:
                useful, steps = useful + seconds, steps + count
                lost["data"] += data
            else:
                lost["replayed"] += seconds + data
    for before, after in itertools.pairwise(starts):
        if not before.finished:
            lost["down"] += max(after.began - before.last, 0.0)
    wall = sum(start.last - start.began for start in starts) + lost["down"]
    known = useful + sum(lost.values())
    lost["other"] = max(wall - known, 0.0)
    return Goodput(max(wall, known), useful, steps, len(starts), lost)
