"""Draws the losses of runs by tokens and by seconds, and prints a table of where they stand, the best first.

python -m megatron_tn.plot runs/first                            writes runs/first/loss.png
python -m megatron_tn.plot runs/decay runs/other output=all.png  a sweep's folder stands for all runs below it

Runs that differ in their seed alone share a row (mean ± standard deviation) and a curve (mean and range).
`python -m launch.compare` writes the same as a page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from megatron_tn.cli import bad_input_exits
from megatron_tn.config import ConfigError, unwritable
from megatron_tn.training.compare import Group, groups_of, table_of
from megatron_tn.training.curve import draw
from megatron_tn.training.run_folder import RunFolder


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    output = next((word.removeprefix("output=") for word in words if word.startswith("output=")), "")
    with bad_input_exits():
        folders = [Path(word) for word in words if not word.startswith("output=")]
        runs = [run for folder in folders for run in runs_in(folder)]
        place = output or str((folders[0] if len(folders) == 1 else Path()) / "loss.png")
        if problems := unwritable("output", place):
            raise ConfigError(problems)
        compare(runs, Path(place))


def runs_in(folder: Path) -> list[Path]:
    """The folder itself where it is a run's, else the runs right below it. Raises ConfigError when there are none."""
    found = [path for path in (folder, *sorted(folder.glob("*/"))) if RunFolder(path).journal.path.is_file()]
    if not found:
        raise ConfigError(f"{folder}: there is no run (no log.jsonl in it or in a folder right below)")
    return found[:1] if found[0] == folder else found


def compare(runs: Sequence[Path], output: Path) -> list[Group]:
    """Print a table and draw a picture of several runs; returns them by settings, the best first.

    Raises:
        OSError: the picture cannot be written.
    """
    groups = groups_of([RunFolder(path) for path in runs])
    titles, rows = table_of(groups)
    table = Table(Column(titles[0], overflow="fold"), *titles[1:])
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
    if draw({group.name: group.runs for group in groups}, output):
        print(f"wrote {output}")
    return groups


if __name__ == "__main__":
    main()
