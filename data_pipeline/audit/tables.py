"""Prints the summary of an audit as terminal tables."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_pipeline.audit.agreement import Estimate, Figures, Summary


def show(found: Summary, problems: list[str], console: Console | None = None) -> None:
    """Prints `found`, and `problems` of the answers file."""
    console = console or Console(highlight=False, markup=False)
    for problem in problems:
        console.print(f"warning: {escape(problem)}", style="yellow")
    how = (
        "Filter against people, strata weighted by documents"
        if found.weighted
        else "Filter against people, sample not stratified: unweighted"
    )
    table = _table(f"{how}; 95 % intervals", "samples", "judged", "agreement", "precision", "recall")
    _row(table, "all", found.overall)
    for title, groups in (("source ", found.sources), ("language ", found.languages), ("", found.places)):
        table.add_section()
        for name, figures in groups.items():
            _row(table, f"{title}{name or '—'}", figures)
    console.print(table)
    counts = found.overall.counts
    grid = _table("Samples, unweighted", "people keep", "people drop")
    for verdict in ("keep", "drop"):
        grid.add_row(f"filter {verdict}s", *(f"{counts[verdict][people]:,}" for people in ("keep", "drop")))
    console.print(grid)
    remarks = [
        f"{found.unsure} unsure, {found.disputed} disputed between auditors: neither is counted",
        f"{found.not_blind} answers given with the filter's verdict in sight",
        "answers: " + (", ".join(f"{name} {count}" for name, count in found.auditors.items()) or "none"),
    ]
    if found.pairs:
        remarks.append(f"auditors agree on {found.pairs_agree} of {found.pairs} pairs of verdicts on one document")
    if found.uncovered:
        documents = sum(row[4] for row in found.uncovered)
        remarks.append(f"{len(found.uncovered)} strata of {documents:,} documents have no decided sample: not covered")
    if found.unknown:
        remarks.append(f"{found.unknown} answers on documents that are not among these samples")
    for remark in remarks:
        console.print(escape(remark))


def _table(title: str, *headers: str) -> Table:
    table = Table("", title=title, title_justify="left")
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _row(table: Table, name: str, figures: Figures) -> None:
    estimates = (figures.agreement, figures.precision, figures.recall)
    table.add_row(escape(name), f"{figures.samples:,}", f"{figures.answered:,}", *map(_estimate, estimates))


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "—"
    return f"{estimate.value:.0%} ({100 * estimate.low:.0f}-{100 * estimate.high:.0f})"
