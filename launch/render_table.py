"""Render the tables of docs/performance.md from the rows of docs/measurements/.

    python -m launch.render_table              write the tables into the page
    python -m launch.render_table --check      only check the page: exit code 1 if its tables are out of date
    python -m launch.render_table rows.jsonl   print the tables of these files

A row is a flat JSON object, one per line, written by `benchmark.output=FILE` of megatron_tn.benchmark and `--output
FOLDER` of kernels.bench. To publish rows, append them to docs/measurements/DATE.jsonl. Of rows for the same measurement
on the same kind of machine, the newest is shown. Exit code 2: a file holds something other than rows.
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.rows import PASSES, STEPS, NotRows, Row, kind_of, read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/performance.md"
ROWS = ROOT / "docs/measurements"
BLOCK = re.compile(r"(<!-- rows: (?P<table>[\w ]+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
ENGINES = {"zero0": "ZeRO 0", "zero1": "ZeRO 1", "zero2": "ZeRO 2", "zero3": "ZeRO 3", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Table:
    """holds: whether a row belongs to the table. same: keys that identify a measurement. order: sort key of the lines.
    line: rows with equal values of these keys share a line. columns: title -> function of a line's rows, its cell."""

    holds: Callable[[Row], bool]
    same: tuple[str, ...]
    line: tuple[str, ...]
    order: Callable[[Row], Any]
    columns: dict[str, Callable[[list[Row]], str]]
    blank: int = 0  # the first `blank` cells are left empty if all equal those of the line above

    def render(self, rows: Iterable[Row]) -> str:
        newest: dict[tuple, Row] = {}
        for row in sorted(filter(self.holds, rows), key=lambda row: row["date"]):
            newest[row["gpu"] or row["cpu"], *_key(row, self.same)] = row
        lines = sorted(newest.values(), key=lambda row: (self.order(row), _sortable(_key(row, self.line))))
        grouped = [list(group) for _, group in itertools.groupby(lines, key=lambda row: _key(row, self.line))]
        cells = [[cell(group) for cell in self.columns.values()] for group in grouped]
        shown = []
        for above, line in itertools.pairwise([[], *cells]):
            repeated = above[: self.blank] == line[: self.blank] and self.blank
            shown.append([""] * self.blank + line[self.blank :] if repeated else line)
        return markdown(self.columns, shown)


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of Markdown. A cell with a line break is on one line; its | stays a character."""
    titles = list(header)
    table = [[" ".join(cell.replace("|", "\\|").split("\n")) for cell in cells] for cells in (titles, *lines)]
    rows = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([rows[0], "|" + "---|" * len(titles), *rows[1:]]) + "\n"


def _key(row: Row, names: Sequence[str]) -> tuple:
    return tuple(row.get(name) for name in names)


def _sortable(values: tuple) -> tuple:
    return tuple((value is not None, str(type(value)), value) for value in values)


def _natural(value: Any) -> list[tuple[bool, float, str]]:
    """Sort key that orders numbers within text by value: 2048 before 16384."""
    parts = re.split(r"(\d+)", str(value))
    return [(part.isdecimal(), float(part) if part.isdecimal() else 0.0, part) for part in parts]


def _number(key: str, form: str) -> Callable[[list[Row]], str]:
    return lambda rows: form.format(rows[0][key]) if rows[0].get(key) is not None else ""


def _text(key: str) -> Callable[[list[Row]], str]:
    return lambda rows: str(rows[0].get(key) or "")


def machine(rows: list[Row]) -> str:
    """Number and name of the GPUs, such as "2 x H200"; without a GPU, the CPU's name."""
    row = rows[0]
    if not row["gpu"]:
        return row["cpu"] or ""
    count = f"{row['gpus']} x " if row.get("gpus", 1) > 1 else ""
    return count + row["gpu"].removeprefix("NVIDIA ")


def commit(rows: list[Row]) -> str:
    """The abbreviated git commit of the measurement, with + if the worktree had uncommitted changes."""
    names = {f"{(row['commit'] or 'unknown')[:7]}{'+' if row.get('dirty') else ''}" for row in rows}
    return ", ".join(sorted(names))


def layout(rows: list[Row]) -> str:
    """Text such as "ZeRO 1, tp 2, sequence parallel, CUDA graph", without axes of size 1 and disabled features."""
    row = rows[0]
    parts = [ENGINES.get(row["engine"], row["engine"].replace("none", ""))]
    parts += [part for part in row["layout"].split(", ") if not part.endswith(" 1")]
    if row["recompute"] != "none":
        policy, _, every = row["recompute"].partition(", ")
        parts.append(f"{policy} recomputation{f' {every}' if every else ''}")
    parts.append({"none": "", "blocks": "compiled blocks"}.get(row["replay"], row["replay"]))
    return ", ".join(filter(None, parts))


def share(kind: str) -> Callable[[list[Row]], str]:
    def cell(rows: list[Row]) -> str:
        used, rate = (rows[0].get(key) for key in (f"utilisation_{kind}", f"{kind}_tflops"))
        return "" if used is None or rate is None else f"{100 * used:.1f} % of {rate:.0f}"

    return cell


def of_floor(passes: str) -> Callable[[list[Row]], str]:
    """Milliseconds of a pass, and their ratio to the pass's lower bound."""

    def cell(rows: list[Row]) -> str:
        for row in rows:
            if row["passes"] == passes:
                return f"{row['value']:.3f}" + (
                    f" ({row['value'] / row['floor_ms']:.2f})" if row.get("floor_ms") else ""
                )
        return ""

    return cell


def extra_memory(rows: list[Row]) -> str:
    return next((f"{row['extra_mib']:.0f}" for row in reversed(rows) if row.get("extra_mib") is not None), "")


def at_batch(batch: int) -> Callable[[list[Row]], str]:
    """Milliseconds that a token of a batch takes."""

    def cell(rows: list[Row]) -> str:
        found = [row["value"] for row in rows if row["batch"] == batch]
        return "".join("does not fit" if value is None else f"{value:.3f}" for value in found)

    return cell


RUN = ("model", "engine", "layout", "recompute", "replay", "gpus", "sequence_length", "micro_batch", "global_batch")
TABLES = {
    "training": Table(
        holds=lambda row: kind_of(row) == "training",
        same=(*RUN, "name"),
        line=(*RUN, "gpu", "name"),
        order=lambda row: (
            *(row["gpu"] or "", row["gpus"], row["parameters"]),
            *(_natural(row[key]) for key in RUN),
            STEPS.index(row["name"]),
        ),
        columns={
            "model": _text("model"),
            "N": _text("sequence_length"),
            "GPUs": machine,
            "layout": layout,
            "what": _text("name"),
            "ms": _number("value", "{:.1f}"),
            "tokens/s": _number("tokens_per_second", "{:,.0f}"),
            "of the sampled rate": share("sampled"),
            "of the datasheet's": share("datasheet"),
            "peak GiB": _number("peak_gib", "{:.1f}"),
            "commit": commit,
        },
        blank=4,
    ),
    "kernels": Table(
        holds=lambda row: kind_of(row) == "kernel",
        same=("operator", "shape", "by", "passes"),
        line=("operator", "shape", "by", "gpu"),
        order=lambda row: (
            *(row["operator"], row["gpu"] or "", _natural(row["shape"]), row.get("by", "")),
            PASSES.index(row["passes"]),
        ),
        columns={
            "operator": _text("operator"),
            "shape": _text("shape"),
            "by": lambda rows: rows[0].get("by", "here"),
            "forward, ms (x floor)": of_floor(PASSES[0]),
            "forward + backward": of_floor(PASSES[1]),
            "extra MiB": extra_memory,
            "GPU": machine,
            "commit": commit,
        },
        blank=1,
    ),
    "decoding": Table(
        holds=lambda row: kind_of(row) == "decoding",
        same=("name", "model", "position", "fp8_weights", "batch"),
        line=("name", "model", "position", "fp8_weights", "gpu"),
        order=lambda row: (_natural(row["model"].removeprefix("transformer_")), row["name"], row["position"]),
        columns={
            "model": lambda rows: rows[0]["model"] + ", LLaMA" * rows[0]["name"].endswith("LLaMA"),
            "after tokens": lambda rows: f"{rows[0]['position']:,}",
            "weights": lambda rows: "fp8" if rows[0]["fp8_weights"] else "bf16",
            **{f"batch {batch}": at_batch(batch) for batch in (1, 8, 16, 64, 256)},
            "GPU": machine,
            "commit": commit,
        },
        blank=1,
    ),
    "data stream": Table(
        holds=lambda row: kind_of(row) == "stream",
        same=("name",),
        line=("name",),
        order=lambda row: row["name"],
        columns={
            "what": lambda rows: rows[0]["name"].removeprefix("stream: "),
            "value": lambda rows: f"{rows[0]['value']:g} {rows[0]['unit']}",
            "machine": machine,
            "commit": commit,
        },
    ),
    "cleaning": Table(
        holds=lambda row: kind_of(row) == "cleaning",
        same=("name",),
        line=("name",),
        order=lambda row: row["name"],
        columns={
            "stage": lambda rows: rows[0]["name"].removeprefix("cleaning: "),
            "MB/s": lambda rows: f"{rows[0]['value']:g}",
            "documents/s": lambda rows: f"{rows[0]['documents_per_s']:g}",
            "machine": machine,
            "commit": commit,
        },
    ),
}  # fmt: skip


def fill(page: str, rows: Sequence[Row], tables: Mapping[str, Table] = TABLES) -> str:
    """`page` with a table between each `<!-- rows: NAME -->` and the `<!-- end of rows -->` after it."""
    return BLOCK.sub(lambda match: f"{match[1]}{tables[match['table']].render(rows)}{match[3]}", page)


def write(page: Path, filled: str, *, check: bool, command: str) -> int:
    """Writes a page, or with `check` says whether it is out of date; returns the exit code. command: that writes it."""
    if not check:
        page.write_text(filled)
    elif page.read_text() != filled:
        print(f"{page.name} is out of date: run {command}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m launch.render_table", description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page is not up to date")
    parser.add_argument("files", nargs="*", type=Path, help="print tables of these rows instead of writing the page")
    options = parser.parse_args(arguments)
    try:
        rows = read(options.files or sorted(ROWS.glob("*.jsonl")))
    except NotRows as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.files:
        print("\n".join(table.render(rows) for table in TABLES.values() if any(map(table.holds, rows))), end="")
        return 0
    return write(PAGE, fill(PAGE.read_text(), rows), check=options.check, command="python -m launch.render_table")


if __name__ == "__main__":
    sys.exit(main())
