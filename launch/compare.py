"""Compare runs: a table of mean and spread over seeds, the best first, and curves by tokens and by seconds.

python -m launch.compare runs/paper                  a sweep's folder: writes compare.png, .html and .md into it
python -m launch.compare runs/a runs/b output=out    runs and sweeps; into the folder out

Runs that differ in their seed alone are one row and one curve, named by the settings in which they differ from most
others (megatron_tn.training.compare); of several with one seed the last one trained counts, and a line says so. The
page compare.html holds table and curves in one file, compare.md the table and its notes.
"""

from html import escape
from pathlib import Path

from data_pipeline.html_page import document, table
from launch.chart import STYLE
from launch.curves import losses, positions
from launch.render_table import markdown
from megatron_tn.cli import of_words
from megatron_tn.config import ConfigError, replacing, shown, unwritable
from megatron_tn.plot import compare, journals_are_read, paths_and_output, runs_in
from megatron_tn.training.compare import Group, notes_of, table_of
from megatron_tn.training.curve import curve_of


@of_words
def main(words: list[str]) -> None:
    folders, named = paths_and_output(words)
    runs = list(dict.fromkeys(run for folder in folders for run in runs_in(folder)))
    output = Path(named) if named or len(folders) > 1 else folders[0]
    picture, page, text = (output / f"compare.{kind}" for kind in ("png", "html", "md"))
    if problems := [problem for path in (picture, page, text) for problem in unwritable("output", str(path))]:
        raise ConfigError(problems)
    with journals_are_read(runs):
        groups = compare(runs, picture)
        notes = (f"\n{note}\n" for note in notes_of(groups))
        contents = {page: page_of(groups), text: "".join([markdown(*table_of(groups)), *notes])}
    for path, content in contents.items():
        with replacing(path) as file:
            file.write(content)
    print(shown(f"wrote {page}\nwrote {text}"))


def page_of(groups: list[Group]) -> str:
    """Table, curves and the folders of every group's runs, in one HTML file without scripts."""
    curves = {group.name: curve for group in groups if (curve := curve_of(group.runs)) is not None}
    charts = [*losses(curves), positions({group.name: group.runs for group in groups})]
    folders = ((group.name, ", ".join(str(run.path) for run in group.runs)) for group in groups)
    parts = [
        table(*table_of(groups)),
        *(f"<p>{escape(note)}</p>" for note in notes_of(groups)),
        "<p>Mean ± standard deviation over seeds, the best first. Curves: mean over seeds, and their range.</p>",
        f'<div class="charts">{"".join(charts)}</div>',
        "<h2>Folders</h2>",
        table(("run", "folders"), folders),
    ]
    return document("Runs compared", parts, STYLE)


if __name__ == "__main__":
    main()
