"""Edits that standardise a document's text: one file per edit, which registers its class with `@edit("NAME")`.

ORDER is their order of application.
"""

from data_pipeline.edits.base import REGISTER, Edit, Editor, make_edits

# `characters` first: the other edits match standardised characters. `notices` after `html`: it matches visible lines.
ORDER = ("characters", "html", "notices", "urls", "punctuation", "numbers")
REGISTER.import_folder(__name__, __path__)
EDITS: dict[str, type[Editor]] = REGISTER.classes(ORDER)

__all__ = ["EDITS", "ORDER", "REGISTER", "Edit", "Editor", "make_edits"]
