"""The picture of one run or several: training loss and held-out loss by tokens, and by position in the document."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tn.evaluation.perplexity import AFTER
from megatron_tn.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(runs: Mapping[str, RunFolder], path: Path, evaluated: Mapping[str, Mapping[int, float]] | None = None) -> bool:
    """Write a PNG. runs: label -> run. evaluated: label -> losses by position, as `positions_of` returns them. Returns
    False, and writes nothing, when there is no loss yet.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    at = {label: {record["step"]: record["tokens"] for record in run.records("loss")} for label, run in runs.items()}
    positions = {label: found for label, run in runs.items() if (found := positions_of(run))} | dict(evaluated or {})
    panels = [functools.partial(_by_tokens, runs, at)] if any(at.values()) else []
    panels += [functools.partial(_by_position, positions)] if positions else []
    if not panels:
        return False
    figure = Figure(figsize=(7 * len(panels), 4), dpi=120, layout="tight")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        panel(axes)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)
    return True


def positions_of(run: RunFolder) -> dict[int, float]:
    """2^k -> the last held-out loss, in nats a token, of predictions after 2^k to 2^(k+1) - 1 tokens of a document;
    empty where there is none."""
    last = run.records("heldout_loss")[-1:]
    return {int(name.removeprefix(AFTER)): loss for record in last for name, loss in record.items() if AFTER in name}


def _by_tokens(runs: Mapping[str, RunFolder], at: Mapping[str, Mapping[int, int]], axes: Axes) -> None:
    """at: label -> step -> tokens."""
    for label, run in runs.items():
        tokens = at[label]
        (line,) = axes.plot(tokens.values(), [record["loss"] for record in run.records("loss")], lw=1, label=label)
        held_out = [record for record in run.records("heldout_loss") if record["step"] in tokens]
        points = [record["heldout_loss"] for record in held_out]
        axes.plot([tokens[record["step"]] for record in held_out], points, "o", ms=3, color=line.get_color())
    axes.set(xlabel="tokens", ylabel="loss (nats a token; dots: held-out)")


def _by_position(positions: Mapping[str, Mapping[int, float]], axes: Axes) -> None:
    for label, losses in positions.items():
        axes.plot(losses.keys(), losses.values(), "o-", ms=3, lw=1, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of the document before (to twice as many)", ylabel="held-out loss (nats a token)")
