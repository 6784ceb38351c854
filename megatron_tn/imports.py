"""Imported first by the program that trains: Python collects no garbage while the other modules are imported. Searching
their growing number of objects for garbage, of which there is none, takes a fifth of the imports' time."""

from __future__ import annotations

import gc

_collecting = gc.isenabled()
gc.disable()


def done() -> None:
    """Collect garbage again, but never look at what has been imported: that would take 0.2 s each time."""
    gc.freeze()
    if _collecting:
        gc.enable()
