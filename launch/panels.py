"""What dashboards show of a run: the panels of a report's page and of a wandb project alike."""

import re
from typing import Any, NamedTuple

WORKSPACE = "megatron_tn"  # name of the view in a wandb project


class Panel(NamedTuple):
    """keys: values of journal records (`training.hooks.figures.shown`); one that ends with / stands for all that begin
    with it. scale: what a value is multiplied by to be in `unit`. log: logarithmic axis. zero: the axis begins at 0.
    changing: worth a look only where a value has changed."""

    title: str
    unit: str
    keys: tuple[str, ...]
    scale: float = 1.0
    log: bool = False
    zero: bool = False
    changing: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Loss": (
        Panel("Loss", "nats a token", ("loss", "heldout_loss")),
        Panel("Perplexity", "exp(nats a token)", ("perplexity", "heldout_perplexity"), log=True),
        Panel("Held-out text", "bits a byte", ("heldout_bits_per_byte", "heldout_bits_per_byte/")),
        Panel("Tasks", "score", ("tasks/",)),
    ),
    "Optimization": (
        Panel("Learning rate", "per step", ("lr",), zero=True),
        Panel("Gradient norm", "before clipping", ("grad_norm",), log=True),
        Panel("Steps without an update", "skipped or refused", ("steps_without_update",), zero=True, changing=True),
    ),
    "Throughput": (
        Panel("Tokens a second and GPU", "tokens/s", ("tokens_per_second_per_gpu",), zero=True),
        Panel("Utilisation", "% of the rate", ("utilisation", "utilisation_sampled"), scale=100, zero=True),
        Panel("Time of a step", "seconds", ("step_seconds", "data_s"), zero=True),
        Panel("Ranks", "seconds a step", ("ranks/forward_s", "ranks/forward_s_max", "ranks/data_s_max"), zero=True),
        Panel("Processes", "processes", ("world_size",), zero=True, changing=True),
    ),
    "Memory": (Panel("Peak of a GPU", "GiB", ("memory/allocated_gib", "memory/reserved_gib"), zero=True),),
    "Progress": (
        Panel("Position in the data", "sequences", ("samples",), zero=True),
        Panel("Tokens trained on", "tokens", ("tokens",), zero=True),
        Panel("Starts", "starts", ("starts",), zero=True, changing=True),
        Panel("Goodput", "% of the wall time", ("goodput",), scale=100, zero=True),
        Panel("Checkpoints", "seconds", ("checkpoint/pause_s", "checkpoint/write_s"), zero=True),
    ),
}


def keys_of(panel: Panel, present: dict[str, object]) -> list[str]:
    """The panel's keys among those that are present."""
    found = (key for key in present for own in panel.keys if key == own or (own.endswith("/") and key.startswith(own)))
    return list(dict.fromkeys(found))


def workspace(entity: str, project: str) -> Any:
    """SECTIONS as a view of a wandb project, a `wandb_workspaces.workspaces.Workspace` that is not saved yet: losses by
    tokens, the rest by step.

    Raises:
        ImportError: the extra panels is not installed.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def plot(panel: Panel, x: str) -> Any:
        unit = panel.unit if panel.scale == 1 else f"{panel.unit} / {panel.scale:g}"
        found = {"title": panel.title, "x": x, "title_y": unit, "log_y": panel.log or None}
        found |= {"range_y": (0.0, None)} if panel.zero else {}
        if not any(key.endswith("/") for key in panel.keys):
            return reports.LinePlot(y=list(panel.keys), **found)
        names = "|".join(re.escape(key) + (".*" if key.endswith("/") else "") for key in panel.keys)
        return reports.LinePlot(metric_regex=f"^({names})$", **found)

    sections = [
        workspaces.Section(
            name=title,
            panels=[plot(panel, "tokens" if title == "Loss" else "Step") for panel in panels],
            is_open=True,
        )
        for title, panels in SECTIONS.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name=WORKSPACE, sections=sections)
