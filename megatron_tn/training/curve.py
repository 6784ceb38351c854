"""The picture of one run or several: training loss and held-out loss by tokens and by seconds of training, and held-out
loss by position in the document."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_tn.config import replacing, shown
from megatron_tn.evaluation.perplexity import AFTER
from megatron_tn.training.run_folder import RunFolder

LONGEST_LABEL = 60  # characters of the legend; a panel has room for about 70
POINTS = 200  # longer curves are drawn as means over 1 / POINTS of their records


class Curve(NamedTuple):
    """Of one run or the mean of several, one value a record: tokens seen, seconds of training steps, loss in nats a
    token, lowest and highest loss of the runs. held_out: rows of (tokens, seconds, held-out loss)."""

    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    held_out: np.ndarray


def draw(
    runs: Mapping[str, RunFolder | Sequence[RunFolder]],
    path: Path,
    evaluated: Mapping[str, Mapping[int, float]] | None = None,
) -> bool:
    """Write a PNG. runs: label -> run, or the runs over which the curve is a mean and its band the range. evaluated:
    label -> losses by position, as `positions_of` returns them, beside those of the runs. Returns False, and writes
    nothing, when there is no loss yet.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    each = {label: [own] if isinstance(own, RunFolder) else own for label, own in runs.items()}
    curves = {label: curve for label, own in each.items() if (curve := curve_of(own)) is not None}
    positions = {label: found for label, own in each.items() if (found := positions_of(own))} | dict(evaluated or {})
    panels = 2 * bool(curves) + bool(positions)
    if not panels:
        return False
    figure = Figure(figsize=(6 * panels, 4.5), dpi=120, layout="constrained")
    places = list(figure.subplots(1, panels, squeeze=False)[0])
    if curves:
        by_tokens, by_seconds = places[:2]
        by_seconds.sharey(by_tokens)
        for axes, column in ((by_tokens, 0), (by_seconds, 1)):
            for label, curve in curves.items():
                (line,) = axes.plot(curve[column], curve.loss, lw=1, label=_shortened(label))
                if not np.array_equal(curve.lowest, curve.highest, equal_nan=True):
                    color = line.get_color()
                    axes.fill_between(curve[column], curve.lowest, curve.highest, color=color, alpha=0.2, lw=0)
                axes.plot(curve.held_out[:, column], curve.held_out[:, 2], "o", ms=3, color=line.get_color())
        by_tokens.set(xlabel="tokens", ylabel="loss (nats a token; dots: held-out)")
        by_seconds.set(xlabel="seconds of training steps")
        early = [curve.loss[len(curve.loss) // 10] for curve in curves.values()]
        if len(curves) > 1 and np.isfinite(early).any():
            by_tokens.set_ylim(top=np.nanmax(early))  # the first tenth would hide by how little the ends differ
        if ratio := _bits_per_byte_of_a_nat(each.values()):
            axis = by_seconds.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bits: bits / ratio))
            axis.set_ylabel("bits per byte of the held-out text")
    if positions:
        for label, losses in positions.items():
            places[-1].plot(losses.keys(), losses.values(), "o-", ms=3, lw=1, label=_shortened(label))
        places[-1].set_xscale("log", base=2)
        places[-1].set(xlabel="tokens of the document before, to twice as many", ylabel="held-out loss (nats a token)")
    for axes in places:
        axes.grid(alpha=0.3)
    places[0].legend(fontsize="small")
    places[-1].legend(fontsize="small")
    with replacing(path, "xb") as file:
        figure.savefig(file, format=path.suffix.removeprefix("."))
    return True


def _shortened(label: str) -> str:
    """A label that leaves room for the curves beside it: settings such as data.manifest are long paths."""
    label = shown(label)
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL // 2]}...{label[-LONGEST_LABEL // 2 :]}"


def positions_of(runs: Sequence[RunFolder]) -> dict[int, float]:
    """2^k -> the last held-out loss, in nats a token, of predictions after 2^k to 2^(k+1) - 1 tokens of a document: the
    mean over runs, where all of them have it; NaN where a loss was."""
    each = []
    for run in runs:
        last = {name: value for record in run.records("heldout_loss")[-1:] for name, value in record.items()}
        found = {int(name.removeprefix(AFTER)): value for name, value in last.items() if AFTER in name}
        each.append({place: math.nan if loss is None else loss for place, loss in found.items()})
    first = sorted(set.intersection(*map(set, each))) if each else []
    return {place: float(np.mean([losses[place] for losses in each])) for place in first}


def _bits_per_byte_of_a_nat(runs: Iterable[Sequence[RunFolder]]) -> float | None:
    """Held-out bits per byte over held-out nats per token: 1 / ln 2 times tokens per byte. None where runs differ in it
    (another tokenizer, another text), or have no such figures."""
    records = [
        record
        for own in runs
        for run in own
        for record in run.records("heldout_bits_per_byte")
        if record["heldout_loss"]
    ]
    ratios = [record["heldout_bits_per_byte"] / record["heldout_loss"] for record in records]
    return ratios[0] if ratios and math.isclose(min(ratios), max(ratios), rel_tol=1e-6) else None


def curve_of(runs: Sequence[RunFolder], points: int | None = POINTS) -> Curve | None:
    """The mean over runs at the steps that all of them have recorded; None where there is no such step. points: more
    records are drawn together; None keeps each."""
    losses, places = [], []
    for run in runs:
        records = run.records("loss")
        before = [0, *(record["step"] for record in records)]  # steps in which a record's mean time is new
        seconds = np.cumsum(
            [r.get("step_seconds", 0.0) * (r["step"] - b) for b, r in zip(before, records, strict=False)]
        )
        recorded = ([0, *(record[name] for record in records)] for name in ("step", "tokens"))
        places.append(np.array([*recorded, [0.0, *seconds]]))
        losses.append({r["step"]: math.nan if r["loss"] is None else r["loss"] for r in records})
    steps = sorted(set.intersection(*(set(own) for own in losses))) if losses else []
    if not steps:
        return None
    each = np.array([[own[step] for step in steps] for own in losses])
    place = np.mean([_place(own, steps) for own in places], axis=0)
    evaluated = [_held_out(run) for run in runs]
    at = sorted(step for step in set().union(*evaluated) if step <= steps[-1])
    held_out = [
        (*where, np.mean([own[step] for own in evaluated if step in own]))
        for step, where in zip(at, np.mean([_place(own, at) for own in places], axis=0), strict=True)
    ]
    width = -(-len(steps) // (points or len(steps)))
    tokens, seconds, loss, lowest, highest = (
        _thinned(values, width) for values in (*place.T, each.mean(0), each.min(0), each.max(0))
    )
    return Curve(tokens, seconds, loss, lowest, highest, np.array(held_out).reshape(-1, 3))


def _place(recorded: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """[steps, 2]: (tokens, seconds) at each step; of a step without a record, such as a skipped one, in proportion
    between the two beside it. recorded [3, records]: step, tokens, seconds."""
    at, *columns = recorded
    return np.stack([np.interp(steps, at, column) for column in columns], axis=1)


def _held_out(run: RunFolder) -> dict[int, float]:
    found = {record["step"]: record["heldout_loss"] for record in run.records("heldout_loss")}
    return {step: math.nan if loss is None else loss for step, loss in found.items()}


def _thinned(values: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` values each; the last may have fewer."""
    return np.array([values[start : start + width].mean() for start in range(0, len(values), width)])
