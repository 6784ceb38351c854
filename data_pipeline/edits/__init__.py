"""Edits that standardise a document's text: one file an edit, which registers its class with `@edit("NAME")`.

ORDER is the only place that says in which order they are made.
"""

from data_pipeline.edits.base import REGISTER, Edit, Editor, make_edits

# Characters first: the others look for what it standardises. Notices after tags: a notice is a line as readers see it.
ORDER = ("characters", "html", "notices", "urls", "punctuation", "numbers")
REGISTER.import_folder(__name__, __path__)
EDITS: dict[str, type[Editor]] = REGISTER.classes(ORDER)

__all__ = ["EDITS", "ORDER", "REGISTER", "Edit", "Editor", "make_edits"]
