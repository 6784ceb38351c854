"""Render tables and curves of docs/results.md from the rows of docs/measurements/results/.

    python -m launch.render_results            write the tables into the page, and the curves beside it
    python -m launch.render_results --check    only check the tables: exit code 1 if they are out of date

Rows are those of `python -m launch.results`; corpus.json beside them is that of `python -m data_pipeline.corpus`.
Seconds of a curve are its tokens over the tokens/s of the model's training loop, measured alone on the GPU. Exit code
2: a file holds something other than rows.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.render_table import ROOT, TABLES, Table, commit, fill, machine, markdown, write
from launch.results.time_to_loss import TimeToLoss, curves_of, label, mean_of, others_of, variant_of
from launch.rows import NotRows, Row, read

PAGE = ROOT / "docs/results.md"
ROWS = ROOT / "docs/measurements/results"
PICTURES = {"results_50m": "results.png", "results_385m": "results_385m.png"}  # plan -> its curves, beside the page
COMMAND = "python -m launch.render_results"
SOURCES = ("code", "documentation", "prose")
POSITIONS = (16, 64, 256, 1024, 4096, 16384)


def mean(key: str) -> Callable[[list[Row]], str]:
    """Mean over a line's rows, and the standard deviation where there are several."""

    def cell(rows: list[Row]) -> str:
        return mean_of([row[key] for row in rows if row.get(key) is not None])

    return cell


CONFIG = ("model", "variant", "lr", "tokens", "sequence_length", "global_batch")
BITS = {
    "peak rate": lambda rows: f"{rows[0]['lr']:g}",
    "seeds": lambda rows: str(len(rows)),
    "tokens": lambda rows: f"{rows[0]['tokens'] / 1e6:.1f} M",
    "bits/byte": mean("value"),
    **{source: mean(f"sources/{source}") for source in SOURCES},
    "whole documents": mean("whole"),
    "GPU": machine,
    "commit": commit,
}
SEQUENCE_POSITIONS = (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
POSITION = {"peak rate": BITS["peak rate"]} | {f"after {first}": mean(f"positions/{first}") for first in POSITIONS}
LONG = {
    "peak rate": BITS["peak rate"],
    "seeds": BITS["seeds"],
    "pieces": mean("value"),
    "pieces, fp8 weights": mean("fp8_weights"),
    **{f"after {first}": mean(f"end_to_end/{first}") for first in SEQUENCE_POSITIONS},
    "GPU": machine,
    "commit": commit,
}
LEVERS = {  # what shortens Muon's schedule
    "model": lambda rows: rows[0]["model"],
    "optimizer, products": lambda rows: label(rows[0]),
    **{title: BITS[title] for title in ("peak rate", "seeds")},
    "steps": lambda rows: str(rows[0]["steps"]),
    **{title: BITS[title] for title in ("tokens", "bits/byte", "GPU", "commit")},
}
RATE_AND_SEED = ("optim.lr", "seed")
DEFAULTS = {  # choices of training that the paper leaves open
    "settings": lambda rows: others_of(rows[0], RATE_AND_SEED) or "as in results.yaml",
    **{title: BITS[title] for title in ("peak rate", "bits/byte", "GPU", "commit")},
}


def of_runs(plan: str, name: str, columns: dict[str, Callable[[list[Row]], str]]) -> Table:
    """A line for each config of a plan; its runs differ in the seed alone. name: the first column's key."""
    return Table(
        holds=lambda row: row["name"] == "result" and row["plan"] == plan,
        same=(*CONFIG, "seed"),
        line=(*CONFIG, "gpu"),
        order=lambda row: (row["tokens"], row[name], row["lr"]),
        columns={name: lambda rows: rows[0][name].removeprefix("paper/")} | columns,
    )


@dataclass(frozen=True)
class AgainstBase:
    """A table with a column more behind that of bits: the difference from the base's run of the same seed, mean and
    standard deviation over seeds."""

    table: Table
    is_base: Callable[[Row], bool]

    def render(self, rows: Sequence[Row]) -> str:
        bases = {row["seed"]: row["value"] for row in filter(self.table.holds, rows) if self.is_base(row)}

        def to_base(line: list[Row]) -> str:
            others = [row for row in line if row["seed"] in bases and not self.is_base(row)]
            return mean_of([row["value"] - bases[row["seed"]] for row in others], "+")

        columns = list(self.table.columns.items())
        columns.insert([name for name, _ in columns].index("bits/byte") + 1, ("to base", to_base))
        return replace(self.table, columns=dict(columns)).render(rows)


RESULTS = {
    "50m": of_runs("results_50m", "model", BITS),
    "50m positions": of_runs("results_50m", "model", POSITION),
    "50m long": of_runs("results_long", "model", LONG),
    "385m": of_runs("results_385m", "model", BITS),
    "levers": Table(
        holds=lambda row: row["name"] == "result" and row["plan"] == "results_levers",
        same=("run",),
        line=("model", "tokens", "variant", "lr"),
        order=lambda row: (row["model"], -row["tokens"], row["variant"], row["lr"]),
        columns=LEVERS,
    ),
    "widths": Table(
        holds=lambda row: row["name"] == "result" and "heads_apart True" in others_of(row),
        same=("run",),
        line=("model", "tokens", "variant", "lr"),
        order=lambda row: (row["steps"], row["model"], row["lr"]),
        columns=LEVERS,
    ),
    "defaults": AgainstBase(
        Table(
            holds=lambda row: row["name"] == "result" and row["plan"] == "results_defaults",
            same=("run",),
            line=("run",),
            order=lambda row: (others_of(row, RATE_AND_SEED), row["lr"]),
            columns=DEFAULTS,
        ),
        is_base=lambda row: not others_of(row, RATE_AND_SEED),
    ),
    "ablations": AgainstBase(
        of_runs("results_ablations", "variant", BITS), is_base=lambda row: row["variant"] == "paper/base"
    ),
    "training": TABLES["training"],
}


def corpus_table(summary: dict) -> str:
    """Documents, text and tokens of each source in the splits."""
    lines = []
    for source, splits in summary["sources"].items():
        cells = [source]
        for split in ("train", "heldout"):
            found = splits.get(split, {"documents": 0, "bytes": 0, "tokens": 0})
            cells += [f"{found['documents']:,}", f"{found['bytes'] / 1e6:.1f}", f"{found['tokens']:,}"]
        lines.append(cells)
    of_split = ("MB", "tokens")
    return markdown(("source", "training documents", *of_split, "held-out documents", *of_split), lines)


def overlap_table(summary: dict) -> str:
    """How much of the held-out text stands in the training text."""
    lines = (
        (source, f"{100 * found['passages']:.1f} %", f"{found['documents']:,}", f"{found['over_half']:,}")
        for source, found in summary["overlap"].items()
    )
    return markdown(("source", "passages found in training", "held-out documents", "more than half found"), lines)


def stage_table(summary: dict) -> str:
    """What each stage of the pipeline left."""
    stages = summary["stages"].items()
    lines = ((name, f"{found['documents']:,}", f"{found['bytes'] / 1e6:.1f}") for name, found in stages)
    return markdown(("stage", "documents left", "MB"), lines)


def package_table(summary: dict) -> str:
    """The packages, with the text that was taken out of them."""
    said = ("version", "licence", "source")
    lines = (
        (name, *(found[key] for key in said), f"{found['files']:,}", f"{found['bytes'] / 1e6:.1f}")
        for name, found in summary["packages"].items()
    )
    return markdown(("package", *said, "files", "MB"), lines)


@dataclass(frozen=True)
class Corpus:
    """A table that is made from corpus.json instead of rows; empty without the file."""

    path: Path
    table: Callable[[dict], str]

    def render(self, _rows: Sequence[Row]) -> str:
        """Raises NotRows for a file that data_pipeline.corpus did not write, or that is cut off."""
        if not self.path.exists():
            return ""
        try:
            return self.table(json.loads(self.path.read_text()))
        except KeyError as error:
            raise NotRows(f"{self.path}: {error.args[0]} missing") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise NotRows(f"{self.path}: {error}") from None


@dataclass(frozen=True)
class Picture:
    """A link to the curves of a plan's runs, where there are any."""

    plan: str

    def render(self, rows: Sequence[Row]) -> str:
        link = f"![held-out bits per byte by tokens and by seconds]({PICTURES[self.plan]})\n"
        return link if curves(rows, self.plan) else ""


def tables() -> dict[str, Table | Corpus | Picture | TimeToLoss]:
    of_corpus = {"corpus": corpus_table, "overlap": overlap_table, "stages": stage_table, "packages": package_table}
    return (
        RESULTS
        | {"curves": Picture("results_50m"), "385m curves": Picture("results_385m")}
        | {"time to the same loss": TimeToLoss()}
        | {name: Corpus(ROWS / "corpus.json", table) for name, table in of_corpus.items()}
    )


def curves(rows: Sequence[Row], plan: str) -> dict[str, list[Row]]:
    """model -> a plan's runs of its best peak rate: the one of the lowest mean bits per byte."""
    found: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["name"] == "result" and row["plan"] == plan:
            found[row["model"]][row["lr"]].append(row)
    value = lambda own: statistics.fmean(row["value"] for row in own)  # noqa: E731
    return {model: min(rates.values(), key=value) for model, rates in found.items()}


def draw(rows: Sequence[Row], plan: str, path: Path) -> None:
    """Held-out bits per byte against tokens and against seconds: mean over seeds, and their range. Seconds are by the
    speeds of the commit that measured most of the plan's models."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    models = curves(rows, plan)
    calls: dict[str, dict[str, float]] = defaultdict(dict)  # commit -> model -> tokens/s
    for row in rows:
        if row["name"] == "training loop" and not variant_of(row):
            calls[row["commit"]][row["model"]] = row["tokens_per_second"]
    speeds = max(calls.values(), key=lambda call: len(call.keys() & models.keys()), default={})
    figure = Figure(figsize=(11, 4), dpi=90, layout="constrained")
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for number, (model, own) in enumerate(sorted(models.items())):
        color = f"C{number}"  # the model's color, the same in both panels
        points = curves_of(own)
        tokens, values = [place for place, _ in points], [each for _, each in points]
        panels = [(by_tokens, [place / 1e6 for place in tokens])]
        if speed := speeds.get(model):
            panels.append((by_seconds, [place / speed for place in tokens]))
        for axes, x in panels:
            axes.plot(x, [statistics.fmean(each) for each in values], lw=1.2, label=model, color=color)
            axes.fill_between(x, list(map(min, values)), list(map(max, values)), alpha=0.2, lw=0, color=color)
    by_tokens.set(xlabel="million training tokens", ylabel="held-out bits per byte")
    by_seconds.set(xlabel="seconds of training, alone on the GPU")
    for axes in (by_tokens, by_seconds):
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize="small")
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=as_it_stands)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page is not up to date")
    options = parser.parse_args(arguments)
    try:
        rows = read(sorted(ROWS.glob("*.jsonl")))
        page = fill(PAGE.read_text(), rows, tables())
    except NotRows as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for plan, picture in PICTURES.items():
        if not options.check and curves(rows, plan):
            draw(rows, plan, PAGE.with_name(picture))
    return write(PAGE, page, check=options.check, command=COMMAND)


if __name__ == "__main__":
    sys.exit(main())
