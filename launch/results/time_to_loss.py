"""The table "time to the same loss" of docs/results.md: how soon Muon and fp8 products have AdamW's final loss in bf16.

Rows are those of plans results_time*: trained runs, and their training loops measured alone on the GPU. The loss is the
held-out bits per byte of a run's evaluations, which all read the same text; between two of them it is interpolated.
"""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from launch.render_table import commit, machine, markdown
from launch.rows import Row

PLAN = "results_time"  # first letters of the plans' names
# Settings of a run that a line shows elsewhere.
SHOWN = ("optim", "engine.products", "optim.lr", "seed", "schedule.steps", "schedule.warmup_steps")
LABELS = {"": "AdamW, bf16", "muon": "Muon, bf16", "fp8": "AdamW, fp8", "muon,fp8": "Muon, fp8"}
VARIANTS = {"muon": ", Muon", "fp8": ", fp8 products"}  # word of a trained run -> text in the layout of a measured one
# Settings that a label shows together.
SHORT = {"momentum 0.8", "equal_norms True", "heads_apart True", "schedule wsd", "decay_fraction 0.5"}
COLUMNS = (
    *("model", "optimizer, products", "peak rate", "seeds", "tokens", "bits/byte", "ms a step"),
    *("AdamW's final loss after", "seconds", "ratio", "GPU", "commit"),
)
STEP = ("model", "sequence_length", "global_batch")

Variant = tuple[str, str]  # a key of LABELS, and the other settings
TODAY: Variant = ("", "")  # AdamW in bf16
Curve = list[tuple[float, float]]  # (tokens, bits per byte), in order


def variant_of(row: Row) -> str:
    """A key of LABELS. row: of a trained run, or of a measured one."""
    return ",".join(word for word, text in VARIANTS.items() if word in _words(row) or text in row.get("layout", ""))


def _words(row: Row) -> list[str]:
    """What sets a trained run apart (planned_run.Run.variant): words of VARIANTS, a number of steps, or others."""
    return list(filter(None, row.get("variant", "").split(",")))


def others_of(row: Row, shown: Sequence[str] = SHOWN) -> str:
    """Settings of a trained run beside those of `shown`, each by its last word: "momentum 0.8, equal_norms True". A
    warm-up that goes with a number of steps is shown by that; one by itself is another setting."""
    own = dict(word.split("=", 1) for word in row.get("run", "").split(",") if "=" in word)
    shown = set(shown) - ({"schedule.warmup_steps"} if "schedule.steps" not in own else set())
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in own.items() if key not in shown)


def _step_of(row: Row) -> tuple[str, bool]:
    """What the time of a step depends on: a key of LABELS, and whether optim.heads_apart is set."""
    return variant_of(row), ", heads apart" in row.get("layout", "") or "heads_apart True" in others_of(row)


def label(row: Row) -> str:
    """Optimizer and products of a trained run, and its other settings."""
    others = list(filter(None, others_of(row).split(", ")))
    if SHORT.issubset(others):
        others = ["settings for short schedules", *(word for word in others if word not in SHORT)]
    return ", ".join([LABELS[variant_of(row)], *others])


def mean_of(values: list[float], sign: str = "") -> str:
    """Mean, and the standard deviation where there are several; "" for none. Of diverged runs how many there are. sign:
    "+" shows it of all means."""
    if not values:
        return ""
    if diverged := sum(not math.isfinite(value) for value in values):
        return f"{diverged} of {len(values)} diverged"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{spread}"


def curves_of(rows: list[Row]) -> list[tuple[float, list[float]]]:
    """(tokens, bits per byte of each row) at the places of the rows' curves that all have."""
    points = [dict(pair.split(":") for pair in row["curve"].split()) for row in rows]
    at = [place for place in points[0] if all(place in each for each in points)]
    return [(1e6 * float(place), [float(each[place]) for each in points]) for place in at]


def first_reached(curve: Curve, target: float) -> float | None:
    """Tokens after which a curve is first at `target` or below; None where it never is."""
    if curve and curve[0][1] <= target:
        return curve[0][0]
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


@dataclass(frozen=True)
class Line:
    """The runs of a model and a variant at one peak rate and over equally many tokens, which differ in their seed."""

    rows: list[Row]
    rate: str
    step_ms: float | None  # time of a step of the training loop, of the newest commit (_newest)

    @property
    def curve(self) -> Curve:
        """Mean over the seeds, at the places that all have."""
        return [(tokens, statistics.fmean(values)) for tokens, values in curves_of(self.rows)]

    def seconds(self, tokens: float | None) -> float | None:
        """Seconds of the steps that read `tokens` tokens, without evaluations."""
        if tokens is None or self.step_ms is None:
            return None
        return tokens / (self.rows[0]["sequence_length"] * self.rows[0]["global_batch"]) * self.step_ms / 1000

    def cells(self, target: float, todays_seconds: float | None) -> list[str]:
        row, values = self.rows[0], [row["value"] for row in self.rows]
        reached = first_reached(self.curve, target)
        seconds = self.seconds(reached)
        ratio = f"{seconds / todays_seconds:.2f}" if seconds and todays_seconds else ""
        return [
            *(row["model"], label(row), self.rate, str(len(values)), f"{row['tokens'] / 1e6:.1f} M"),
            mean_of(values),
            "" if self.step_ms is None else f"{self.step_ms:.1f}",
            "not reached" if reached is None else f"{reached / 1e6:.1f} M",
            "" if seconds is None else f"{seconds:.1f}",
            *(ratio, machine(self.rows), commit(self.rows)),
        ]


class TimeToLoss:
    """For each model, a line a variant (and number of tokens and other settings, where there are several) at its
    best peak rate. AdamW's final loss: that of the last evaluation in bf16, the mean over seeds."""

    def render(self, rows: Sequence[Row]) -> str:
        shown = []
        for lines in _by_model(rows).values():
            today = max((line for variant, line in lines if variant == TODAY), key=lambda line: line.rows[0]["tokens"])
            target = today.curve[-1][1]
            seconds = today.seconds(first_reached(today.curve, target))
            order = sorted(
                lines, key=lambda found: (-found[1].rows[0]["tokens"], [*LABELS].index(found[0][0]), found[0])
            )
            shown += [line.cells(target, seconds) for _, line in order]
        return markdown(COLUMNS, shown)


def _by_model(rows: Sequence[Row]) -> dict[tuple, list[tuple[Variant, Line]]]:
    """(model, sequence_length, global_batch, GPU) -> its variants' lines, where TODAY is among them."""
    measured, trained = defaultdict(list), defaultdict(list)
    for row in sorted(rows, key=lambda row: row["date"]):
        of_model = (*(row.get(key) for key in STEP), row["gpu"])
        if row["name"] == "training loop" and row.get("gpus", 1) == 1:
            measured[of_model, _step_of(row)].append(row)
        elif row["name"] == "result" and (others_of(row) or all(w in VARIANTS or w.isdigit() for w in _words(row))):
            trained[of_model, (variant_of(row), others_of(row)), row["tokens"]].append(row)
    found = defaultdict(list)
    for (of_model, variant, _), runs in trained.items():
        if (line := _line(runs, _newest(measured[of_model, _step_of(runs[0])]))) is not None:
            found[of_model].append((variant, line))
    return {key: found[key] for key in sorted(found, key=str) if any(variant == TODAY for variant, _ in found[key])}


def _newest(measured: list[Row]) -> float | None:
    """Median of the values of the newest commit, at the fastest micro-batch; None without rows. measured: the oldest
    first."""
    by_micro_batch = defaultdict(list)
    for row in measured:
        by_micro_batch[row.get("micro_batch")].append(row)
    newest = [
        statistics.median(row["value"] for row in rows if row["commit"] == rows[-1]["commit"])
        for rows in by_micro_batch.values()
    ]
    return min(newest, default=None)


def _line(runs: list[Row], step_ms: float | None) -> Line | None:
    """The line of one variant at its peak learning rate: the rate that most seeds of a plan results_time* have, of
    several such rates the best. None without such a run, or where its seeds have no evaluation at the same place. runs:
    the oldest first; runs of other plans count as tried rates."""
    seeds, lowest = defaultdict(dict), {}
    for row in runs:
        lowest[row["lr"]] = min(row["value"], lowest.get(row["lr"], row["value"]))
        if row["plan"].startswith(PLAN) and row.get("curve"):
            seeds[row["lr"]][row["seed"]] = row  # the newest of a seed
    if not seeds:
        return None
    rate = min(seeds, key=lambda lr: (-len(seeds[lr]), lowest[lr]))
    bracketed = min(lowest, key=lowest.get) == rate and min(lowest) < rate < max(lowest)
    tried = f"of {len(lowest)}, {'' if bracketed else 'not '}bracketed" if len(lowest) > 1 else "the only one"
    line = Line(list(seeds[rate].values()), f"{rate:g} ({tried})", step_ms)
    return line if line.curve else None
