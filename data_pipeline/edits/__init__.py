"""Edits that standardise a document's text. One file an edit; `EDITS` is the order in which they are made."""

from data_pipeline.edits.base import Edit, Editor
from data_pipeline.edits.characters import Characters
from data_pipeline.edits.html import Html
from data_pipeline.edits.notices import Notices
from data_pipeline.edits.numbers import Numbers
from data_pipeline.edits.punctuation import Punctuation
from data_pipeline.edits.urls import Urls

# Characters first: what it standardises is what the others look for. Notices after tags: by lines that people see.
EDITS: dict[str, type[Editor]] = {
    "characters": Characters,
    "html": Html,
    "notices": Notices,
    "urls": Urls,
    "punctuation": Punctuation,
    "numbers": Numbers,
}

__all__ = ["EDITS", "Characters", "Edit", "Editor", "Html", "Notices", "Numbers", "Punctuation", "Urls"]
