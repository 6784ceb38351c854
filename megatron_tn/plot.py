"""Draws the losses of runs by tokens, by seconds and by position in the document, and prints a table of where they
stand, the best first.

python -m megatron_tn.plot runs/first                            writes runs/first/loss.png
python -m megatron_tn.plot runs/decay runs/other output=all.png  a sweep's folder stands for all runs below it
python -m megatron_tn.plot ours.json theirs.json                 files of evaluate's output=: losses by position

Runs that differ in their seed alone share a row (mean ± standard deviation) and a curve (mean and range); of several
with one seed the last one trained counts, and a line says so. A row is named by the settings in which it differs from
most others, or "reference" if it differs in none.
`python -m launch.compare` writes the same as a page.
"""

import contextlib
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Column, Table

from megatron_tn.cli import of_words
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ConfigError, read_mapping, shown, unwritable
from megatron_tn.training.compare import Group, groups_of, notes_of, table_of
from megatron_tn.training.curve import curve_of, draw
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.summary import figures_of

NAME = 10  # characters of a line of a group's name, at least
FORMATS = (".png", ".svg", ".pdf")


@of_words
def main(words: list[str]) -> None:
    paths, output = paths_and_output(words)
    files = [path for path in paths if path.suffix == ".json"]
    names = Counter(path.name for path in files)
    evaluated = {path.name if names[path.name] == 1 else str(path): positions_in(path) for path in files}
    runs = [run for path in paths if path.suffix != ".json" for run in runs_in(path)]
    place = output or str((paths[0] if len(paths) == 1 and runs else Path()) / "loss.png")
    problems = unwritable("output", place)
    if Path(place).suffix not in FORMATS:
        problems.append(f"output={place} must end in {', '.join(FORMATS)}: the ending is the picture's format")
    if problems:
        raise ConfigError(problems)
    with journals_are_read(runs):
        compare(runs, Path(place), evaluated)


def paths_and_output(words: Sequence[str]) -> tuple[list[Path], str]:
    """The paths among a command line's words, and the value of output=, "" where it is not set. Raises ConfigError for
    another setting, and where no path is named."""
    named = [word for word in words if not word.startswith("output=")]
    problems = [
        f"unknown setting {word}; there is output=" for word in named if "=" in word and not Path(word).exists()
    ]
    if not named:
        problems.append("no run is named: give the folders of runs or of sweeps")
    if problems:
        raise ConfigError(problems)
    return list(map(Path, named)), next((word.removeprefix("output=") for word in words if word not in named), "")


def runs_in(folder: Path) -> list[Path]:
    """The folder itself where it is a run's, else the runs right below it. Raises ConfigError when there are none."""
    found = [path for path in (folder, *sorted(folder.glob("*/"))) if RunFolder(path).journal.path.is_file()]
    if not found:
        raise ConfigError(f"{folder}: there is no run (no log.jsonl in it or in a folder right below)")
    return found[:1] if found[0] == folder else found


@contextlib.contextmanager
def journals_are_read(runs: Sequence[Path]) -> Iterator[None]:
    """Raises ConfigError where the block fails on a journal of `runs`, which has records of a damaged file or another
    program. Named is the first run whose figures fail, or else all of them."""
    try:
        yield
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        named = next((run for run in runs if _is_foreign(RunFolder(run))), ", ".join(map(str, runs)))
        raise ConfigError(f"{named}: log.jsonl has records that no run wrote: {error!r}") from None


def _is_foreign(run: RunFolder) -> bool:
    try:
        figures_of(run)
        curve_of([run])
    except Exception:
        return True
    return False


def positions_in(file: Path) -> dict[int, float]:
    """As `training.curve.positions_of`, of an output of `megatron_tn.evaluate`. Raises ConfigError if it has none."""
    try:
        positions = read_mapping(file)["positions"]
        return {int(first): figures["nats_per_token"] for first, figures in positions.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        why = error if isinstance(error, ConfigError) else "it is no output of megatron_tn.evaluate manifest=..."
        raise ConfigError(f"{file}: {why}") from None


def compare(
    runs: Sequence[Path], output: Path, evaluated: Mapping[str, Mapping[int, float]] | None = None
) -> list[Group]:
    """Print a table and draw a picture of several runs; returns them by settings, the best first.

    evaluated: label -> losses by position, beside those of the runs.

    Raises:
        OSError: the picture cannot be written.
    """
    groups = groups_of([RunFolder(path) for path in runs]) if runs else []
    if groups:
        out = table_console()
        out.print(_table(*table_of(groups), out.width))
        for note in notes_of(groups):
            print(note)
    if draw({group.name: group.runs for group in groups}, output, evaluated):
        print(shown(f"wrote {output}"))
    return groups


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """Where the table is wider than `width` characters, titles are broken at spaces, figures behind ±, names to a
    setting a line."""
    cells = list(zip(titles, *rows, strict=True))
    widths = [max(map(len, column)) for column in cells]
    room = width - 3 * len(titles) - 1  # two spaces and a line beside each column
    if sum(widths) > room:
        lines = ([*title.split(), *re.split("(?<=±) |\n", "\n".join(column))] for title, *column in cells[1:])
        narrow = [max(map(len, of_column)) for of_column in lines]
        widths = [max(room - sum(narrow), NAME), *narrow]
        rows = [
            ("\n".join(line for word in name.split() for line in textwrap.wrap(word, widths[0])), *rest)
            for name, *rest in rows
        ]
    table = Table(*(Column(title, width=characters) for title, characters in zip(titles, widths, strict=True)))
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
