"""The curves of runs, as charts of a page."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.chart import Line, Mark, chart
from launch.panels import SECTIONS, Panel, keys_of
from megatron_tn.training.curve import Curve, curve_of, positions_of
from megatron_tn.training.hooks.figures import shown
from megatron_tn.training.run_folder import RunFolder

NAMES = {
    "loss": "training",
    "perplexity": "training",
    "heldout_loss": "held-out",
    "heldout_perplexity": "held-out",
    "heldout_bits_per_byte": "all",
    "utilisation": "datasheet's rate",
    "utilisation_sampled": "measured matrix rate",
    "step_seconds": "step",
    "data_s": "of it waiting for data",
    "ranks/forward_s": "forward, median",
    "ranks/forward_s_max": "forward, slowest",
    "ranks/data_s_max": "waiting for data, slowest",
    "memory/allocated_gib": "allocated",
    "memory/reserved_gib": "reserved",
    "checkpoint/pause_s": "training paused",
    "checkpoint/write_s": "writing",
}


def of_run(run: RunFolder, records: Sequence[dict[str, Any]], planned_gib: float | None) -> Iterator[str]:
    """A section of the page for each of SECTIONS that the run has values for; the loss stands by tokens and by seconds.
    planned_gib: memory that the plan has for the allocator."""
    series, marks = series_of(records, run.starts()), marks_of(records)
    curve = curve_of([run], points=None)
    yield (
        "<p>A point tells its value when the pointer rests on it; a band is the range of the values that a point "
        "stands for. Red, dashed: a restart; dotted: a rewind.</p>"
    )
    for title, panels in SECTIONS.items():
        level = (planned_gib, f"planned: {planned_gib:.1f} GiB") if planned_gib and title == "Memory" else None
        charts = [_panel(panel, series, marks, level) for panel in panels]
        if title == "Loss" and curve is not None:
            charts = [*losses({"": curve}, marks), *charts[1:], positions({"": [run]})]  # instead of losses by step
        if any(charts):
            yield f'<h2>{title}</h2><div class="charts">{"".join(charts)}</div>'


def losses(curves: Mapping[str, Curve], marks: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Charts by tokens and by seconds of training. Held-out losses are in the chart of a single curve, and in charts of
    their own for several. curves: name of a run or group -> its curve. marks: as `marks_of` returns them."""
    training, held_out = [], []
    for x_label, column, place in (("tokens", 0, "tokens"), ("seconds of training steps", 1, "seconds")):
        several = len(curves) > 1
        lines = [
            Line(name if several else "training", curve[column], curve.loss, curve.lowest, curve.highest)
            for name, curve in curves.items()
        ]
        dots = [
            Line(name if several else "held-out", curve.held_out[:, column], curve.held_out[:, 2], dots=True)
            for name, curve in curves.items()
        ]
        places = [Mark(mark[place], mark["kind"], mark["text"]) for mark in marks]
        shape = {"x_label": x_label, "y_label": "nats a token", "marks": places, "settled": True}
        training.append(chart(f"Loss by {x_label}", lines if several else lines + dots, **shape))
        held_out.append(chart(f"Held-out loss by {x_label}", dots, **shape) if several else "")
    return training + held_out


def positions(runs: Mapping[str, Sequence[RunFolder]]) -> str:
    """The last held-out loss by position in the document. runs: name of a run or group -> its runs."""
    lines = []
    for name, own in runs.items():
        if losses := positions_of(own):
            lines.append(Line(name, np.log2(list(losses)), list(losses.values()), dots=True))
    return chart(
        "Held-out loss by position", lines, x_label="k: after 2^k tokens of the document", y_label="nats a token"
    )


def series_of(
    records: Sequence[dict[str, Any]], began: Sequence[float] = ()
) -> dict[str, tuple[list[int], list[float]]]:
    """Name of a value -> its steps and values, as dashboards show them; NaN where a step has it without a number.
    began: of all starts, as `RunFolder.starts` returns it."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    starts = 0
    for record in records:
        if "start/began" in record:
            starts = max(starts + 1, bisect_right(began, record["start/began"]))
        values = shown(record) | ({"starts": starts} if starts and "loss" in record else {})
        if record.get("loss", 0) is None:
            values |= {"loss": math.nan, "perplexity": math.nan}
        for name, value in values.items():
            steps, own = found.setdefault(name, ([], []))
            steps.append(record["step"])
            own.append(value)
    return found


def marks_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Restarts and rewinds: {"kind", "text", "step", "tokens", "seconds" (of training)}."""
    found, tokens, seconds, step, starts = [], 0, 0.0, 0, 0
    for record in records:
        if "loss" in record:
            seconds += record.get("step_seconds", 0.0) * (record["step"] - step)
            step, tokens = record["step"], record["tokens"]
        mark = None
        if "start/began" in record:
            starts += 1
            mark = ("restart", f"restart from step {record['step']}") if starts > 1 else None
        if "rewind/from" in record:
            skipped = record.get("rewind/skip", [])
            mark = (
                "rewind",
                f"from step {record['rewind/from']} to {record['step']}; skipped batches: {skipped or 'none'}",
            )
        if mark:
            place = {"step": record["step"], "tokens": tokens, "seconds": seconds}
            found.append(dict(zip(("kind", "text"), mark, strict=True)) | place)
    return found


def _panel(
    panel: Panel,
    series: Mapping[str, tuple[list[int], list[float]]],
    marks: Sequence[dict[str, Any]],
    level: tuple[float, str] | None,
) -> str:
    lines = []
    most = max((len(steps) for steps, _ in series.values()), default=0)
    last = max((steps[-1] for steps, _ in series.values()), default=0)
    for key in keys_of(panel, series):
        steps, values = series[key]
        if len(steps) < 2 or (panel.changing and len(set(values)) < 2):
            continue
        prefix = next((own for own in panel.keys if own.endswith("/") and key.startswith(own)), "")
        label = NAMES.get(key, key.removeprefix(prefix).replace("_", " "))
        label = "" if len(panel.keys) == 1 and not prefix else label
        lines.append(Line(label, steps, np.multiply(values, panel.scale), dots=len(steps) < most // 4))
    places = [Mark(mark["step"], mark["kind"], mark["text"]) for mark in marks]
    shape = {"until": last, "log": panel.log, "zero": panel.zero, "settled": True}
    return chart(panel.title, lines, x_label="step", y_label=panel.unit, marks=places, level=level, **shape)
