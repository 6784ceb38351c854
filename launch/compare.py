"""Compare runs: a table of mean and spread over seeds, the best first, and curves by tokens and by seconds.

python -m launch.compare runs/paper                  a sweep's folder: writes compare.png, .html and .md into it
python -m launch.compare runs/a runs/b output=out    runs and sweeps; into the folder out

Runs that differ in their seed alone are one row and one curve, named by the settings in which they differ from most
others (megatron_tn.training.compare). The page compare.html holds table and picture in one file, compare.md the table.
"""

from __future__ import annotations

import base64
import html
import sys
from pathlib import Path

from megatron_tn.cli import bad_input_exits
from megatron_tn.config import ConfigError, unwritable
from megatron_tn.plot import compare, paths_and_output, runs_in
from megatron_tn.training.compare import Group, table_of

STYLE = (
    "body{font:15px sans-serif;margin:2em} td,th{padding:.2em .8em;text-align:right} td:first-child{text-align:left}"
)


def main() -> None:
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return
    with bad_input_exits():
        folders, named = paths_and_output(words)
        runs = list(dict.fromkeys(run for folder in folders for run in runs_in(folder)))
        output = Path(named) if named or len(folders) > 1 else folders[0]
        picture, page, text = (output / f"compare.{kind}" for kind in ("png", "html", "md"))
        if problems := [problem for path in (picture, page, text) for problem in unwritable("output", str(path))]:
            raise ConfigError(problems)
        groups = compare(runs, picture)
        page.write_text(page_of(groups, picture))
        titles, rows = table_of(groups)
        text.write_text("".join(f"| {' | '.join(cells)} |\n" for cells in (titles, ["---"] * len(titles), *rows)))
        print(f"wrote {page}\nwrote {text}")


def page_of(groups: list[Group], picture: Path) -> str:
    """Table, picture and the folders of every group's runs, in one HTML file."""
    titles, rows = table_of(groups)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    drawn = ""
    if picture.is_file():
        drawn = f'<img alt="loss" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
    folders = "".join(
        f"<li>{html.escape(group.name)}: {html.escape(', '.join(str(run.path) for run in group.runs))}</li>"
        for group in groups
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>Runs compared</title><style>{STYLE}</style>'
        f"<h1>Runs compared</h1><table><tr>{head}</tr>{body}</table>"
        f"<p>Mean ± standard deviation over seeds, the best first. Curves: mean over seeds, and their range.</p>{drawn}"
        f"<h2>Folders</h2><ul>{folders}</ul>\n"
    )


if __name__ == "__main__":
    main()
