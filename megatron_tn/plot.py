"""Draws the losses of runs by tokens, and prints a table of where they stand.

python -m megatron_tn.plot runs/first                            writes runs/first/loss.png
python -m megatron_tn.plot runs/decay runs/other output=all.png  a sweep's folder stands for all runs below it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_tn.cli import bad_input_exits
from megatron_tn.config import ConfigError, unwritable
from megatron_tn.training.curve import draw
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.summary import sweep_table


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


def compare(runs: Sequence[Path], output: Path) -> None:
    """One table and one picture of several runs. A job of a sweep is named after the settings that it varies.

    Raises:
        OSError: the picture cannot be written.
    """
    named = {path.name: RunFolder(path) for path in runs}
    if len(named) < len(runs):
        named = {str(path): RunFolder(path) for path in runs}
    Console(highlight=False, markup=False).print(sweep_table(named.items()))
    if draw(named, output):
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
