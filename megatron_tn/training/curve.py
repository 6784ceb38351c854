"""The picture of one run or several: training loss and held-out loss by tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_tn.training.run_folder import RunFolder


def draw(runs: Mapping[str, RunFolder], path: Path) -> bool:
    """Write a PNG. runs: label -> run. Returns False, and writes nothing, when no run has a loss yet.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
    axes = figure.add_subplot()
    tokens = 0
    for label, run in runs.items():
        records = run.records("loss")
        at = {record["step"]: record["tokens"] for record in records}
        tokens = max([tokens, *at.values()])
        (line,) = axes.plot(at.values(), [record["loss"] for record in records], lw=1, label=label)
        held_out = [record for record in run.records("heldout_loss") if record["step"] in at]
        if held_out:
            points = [record["heldout_loss"] for record in held_out]
            axes.plot([at[record["step"]] for record in held_out], points, "o", ms=3, color=line.get_color())
    if not tokens:
        return False
    axes.set(xlabel="tokens", ylabel="loss (nats a token; dots: held-out)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return True
