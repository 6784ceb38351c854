"""Where command lines print their tables."""

import os

from rich.console import Console

UNLIMITED = 10_000  # characters of a line that no terminal breaks


def table_console() -> Console:
    """Standard output: as wide as the terminal or COLUMNS; into a pipe or a file, as wide as the tables."""
    out = Console(highlight=False, markup=False)
    return (
        out if out.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, markup=False, width=UNLIMITED)
    )
