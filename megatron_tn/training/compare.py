"""Runs side by side: those that differ in their seed alone are a group, named by the settings in which it differs."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron_tn.config import ConfigError, shown, to_mapping
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.summary import figures_of

# Settings that change neither the model nor what it learns from.
ASIDE = ("run_dir", "nodes", "stop_after", "hang_timeout_s", "distributed_timeout_s")
GROUPS_ASIDE = ("logging.", "checkpoint.", "cluster.", "guard.")
REFERENCE = "reference"  # name of the group that differs in nothing from the most common values
PADDING = 0.01  # share of tokens that padding may take from a run and not from another
MOST_SETTINGS = 4  # in a group's name; runs with less in common are named by their folders
# Figure -> column title and format.
COLUMNS = {
    "tokens": ("tokens", ",.0f"),
    "loss": ("loss", ".3f"),
    "heldout_loss": ("held-out", ".3f"),
    "heldout_bits_per_byte": ("bits/byte", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
SPREAD = ("loss", "heldout_loss", "heldout_bits_per_byte")  # figures shown with their deviation over seeds
ORDER = ("heldout_bits_per_byte", "heldout_loss", "loss")  # the first figure that all groups have sorts them


@dataclass(frozen=True)
class Group:
    """Runs of equal settings but for the seed. name: the settings that set it apart, as on a command line. repeated:
    pairs of a run that is left out, and the later one of the same seed in `runs`. seeds: of each run."""

    name: str
    runs: list[RunFolder]
    seeds: Mapping[RunFolder, int | str]
    repeated: list[tuple[RunFolder, RunFolder]] = field(default_factory=list)

    def notes(self) -> list[str]:
        """A line for the reference, for each run that is left out, and for each that has been trained on fewer tokens
        than the others."""
        lines = [f"{REFERENCE}: the value that most rows have, for every setting"] * (self.name == REFERENCE)
        lines += [f"{run} is left out: {last} is a later run of its settings and seed" for run, last in self.repeated]
        tokens = {run: found.get("tokens", 0) for run, found in self.figures.items()}
        most = max(tokens.values())
        lines += [
            f"{run} is at {count:,} tokens, others of its settings at {most:,}: their row is a mean of unequal runs"
            for run, count in tokens.items()
            if not as_many(count, most)
        ]
        return list(map(shown, lines))

    @cached_property
    def figures(self) -> dict[RunFolder, dict[str, Any]]:
        """`summary.figures_of` every run, whose journal is read once for all of them."""
        return {run: figures_of(run) for run in self.runs}

    def values(self, figure: str) -> list[float]:
        """The figure of every run that has it."""
        return [found[figure] for found in self.figures.values() if figure in found]

    def above(self, base: "Group", figure: str) -> list[float]:
        """Differences of the figure from that of base's run of the same seed, after as many tokens. Such runs have read
        the same tokens in one order, so their difference varies less over seeds than either figure."""
        of_base = {base.seeds[run]: found for run, found in base.figures.items()}
        pairs = ((found, of_base.get(self.seeds[run], {})) for run, found in self.figures.items())
        return [
            own[figure] - other[figure]
            for own, other in pairs
            if figure in own and figure in other and as_many(own.get("tokens", 0), other.get("tokens", 0))
        ]


def as_many(tokens: int, others: int) -> bool:
    """Whether two runs have been trained on equally many tokens, but for padding."""
    return abs(tokens - others) <= PADDING * max(tokens, others)


def groups_of(runs: Sequence[RunFolder]) -> list[Group]:
    """Best first: by held-out bits per byte, or held-out loss, or loss, whichever all groups have."""
    members: dict[str, list[RunFolder]] = {}
    settings, seeds = {}, {}
    for run in runs:
        values = _settings(run)
        seeds[run] = values.pop("seed")
        key = json.dumps(values, sort_keys=True)
        settings.setdefault(key, values)
        members.setdefault(key, []).append(run)
    folders = [[shown(run.path.name) for run in found] for found in members.values()]
    names = group_names(list(settings.values()), folders)
    groups = [_group(name, found, seeds) for name, found in zip(names, members.values(), strict=True)]
    figure = _ranking(groups)
    return sorted(groups, key=lambda group: _rank(group, figure)) if figure else groups


def _ranking(groups: Sequence[Group]) -> str | None:
    """The figure that sorts the groups."""
    return next((figure for figure in ORDER if all(group.values(figure) for group in groups)), None)


def _group(name: str, runs: Sequence[RunFolder], seeds: Mapping[RunFolder, int | str]) -> Group:
    """The group of these runs; of several runs with one seed, the one that was trained last counts."""
    by_time = sorted(runs, key=lambda run: max((record.get("time", 0.0) for record in run.journal.tail()), default=0.0))
    last = {seeds[run]: run for run in by_time}
    repeated = [(run, last[seeds[run]]) for run in runs if last[seeds[run]] is not run]
    return Group(name, [run for run in runs if last[seeds[run]] is run], seeds, repeated)


def table_of(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Titles, and a row of cells for each group: means over its runs, losses ± the standard deviation; of tokens the
    range where they differ. The last column, where runs share seeds: the difference by seed from the reference, or from
    the best group where none is one."""
    shown = [figure for figure in COLUMNS if any(group.values(figure) for group in groups)]
    rows = []
    for group in groups:
        cells = [_cell(figure, group.values(figure)) for figure in shown]
        rows.append([group.name, str(len(group.runs)), *cells])
    titles = ["run", "seeds", *(COLUMNS[figure][0] for figure in shown)]
    if (paired := _paired(groups)) is not None:
        titles.append(paired.title)
        rows = [[*row, _cell(paired.figure, values, "+z")] for row, values in zip(rows, paired.values, strict=True)]
    return titles, rows


def notes_of(groups: Sequence[Group]) -> list[str]:
    """Lines below the table of groups."""
    paired, notes = _paired(groups), []
    if paired is not None:
        figure = COLUMNS[paired.figure][0]
        notes.append(f"{paired.title}: difference in {figure} from its run of the same seed after equal tokens")
    return [*notes, *(note for group in groups for note in group.notes())]


@dataclass(frozen=True)
class _Paired:
    """Differences of a figure by seed from one group, for each group; none for that one."""

    title: str
    figure: str
    values: list[list[float]]


def _paired(groups: Sequence[Group]) -> _Paired | None:
    """From the reference, or from the best group where none is one; None where no runs share a seed."""
    base = next((group for group in groups if group.name == REFERENCE), groups[0])
    figure = _ranking(groups)
    values = [group.above(base, figure) if figure and group is not base else [] for group in groups]
    title = f"to {REFERENCE if base.name == REFERENCE else 'first row'}"
    return _Paired(title, figure, values) if any(values) else None


def _cell(figure: str, values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    form = COLUMNS[figure][1]
    if figure == "tokens" and min(values) < max(values):
        return f"{min(values):{form}} to {max(values):{form}}"
    mean = f"{np.mean(values):{sign}{form}}"
    return f"{mean} ± {np.std(values, ddof=1):{form}}" if figure in SPREAD and len(values) > 1 else mean


def _rank(group: Group, figure: str) -> float:
    mean = np.mean(group.values(figure))
    return math.inf if math.isnan(mean) else mean  # a run that diverged is the worst


def _settings(run: RunFolder) -> dict[str, Any]:
    """Dotted name -> value of what may change a run's result, and of the seed; the folder's name and path where it has
    no (readable) settings."""
    try:
        values = flat(to_mapping(run.frozen_config()))
    except ConfigError:
        return {"run": run.path.name, "seed": str(run.path)}
    return {key: value for key, value in values.items() if key not in ASIDE and not key.startswith(GROUPS_ASIDE)}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> dotted name: value."""
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def group_names(settings: list[dict[str, Any]], folders: list[list[str]]) -> list[str]:
    """One name a group: its settings that differ from the most common value, or all values where none is. Settings of a
    model are compared among groups of one model.name, which says the others. REFERENCE for a group that differs in
    nothing; the folders' names in the place of more than MOST_SETTINGS settings."""
    keys = dict.fromkeys(key for own in settings for key in own)
    columns = {key: [json.dumps(own.get(key)).strip('"') for own in settings] for key in keys}
    sizes = columns.get("model.name", [""] * len(settings))
    names = []
    for index, own in enumerate(folders):
        differing = []
        for key, values in columns.items():
            of_model = key.startswith("model.") and key != "model.name"
            peers = [value for value, size in zip(values, sizes, strict=True) if not of_model or size == sizes[index]]
            if len(set(peers)) > 1 and (key == "model.name" or values[index] != _most_common(peers)):
                differing.append(f"{key}={values[index]}")
        if len(settings) == 1 or len(differing) > MOST_SETTINGS:
            names.append(", ".join(own))
        else:
            names.append(", ".join(differing) or REFERENCE)
    return names


def _most_common(values: list[str]) -> str | None:
    """The most common value; None where two values are equally common."""
    (first, count), *others = Counter(values).most_common(2)
    return None if others and others[0][1] == count else first
