"""Whether decoding restores the text: bits per byte would otherwise be measured on another text."""

from pathlib import Path

import numpy as np
from datatrove.data import Document

from data_pipeline.config import Settings
from data_pipeline.document import text_bytes, text_hash
from data_pipeline.encoder import Encoder
from data_pipeline.errors import InputError
from data_pipeline.readers import documents_of
from data_pipeline.readers.base import File
from data_pipeline.sources import category_of
from data_pipeline.steps.rules import ApplyRules
from data_pipeline.tokenizer import load

PROVEN_FIRST = 4  # first documents per category and task whose encoding is checked by decoding
PROOF = 16  # one in 16 of the later documents is checked
SHOWN = 20  # characters after the first difference in a message
FILES_BEFORE, BYTES_BEFORE = 32, 2_000_000  # checked per source before a run begins, in evenly spaced files


class RoundTrip:
    """Checks that decoding restores the text, for the first PROVEN_FIRST documents of each category and one in PROOF of
    the rest. `setting`: names the tokenizer in messages. `proven`: {category: [documents, bytes]} restored exactly."""

    def __init__(self, setting: str, tokenizer, categories: dict[str, str]):
        self.setting = setting
        self.tokenizer = tokenizer
        self.categories = categories
        self.proven: dict[str, list[int]] = {}

    def check(self, document: Document, ids: np.ndarray, always: bool = False) -> None:
        """Raises InputError naming the category, the document and the first difference."""
        category = self.categories[document.metadata["source"]]
        proven = self.proven.setdefault(category, [0, 0])
        if not always and proven[0] >= PROVEN_FIRST and int(text_hash(document.text)[32:48], 16) % PROOF:
            return
        decoded = self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        if decoded != document.text:
            place, given, came = first_difference(document.text, decoded)
            raise InputError(
                f"{self.setting}: category {category!r}, document {document.id!r} does not decode to its own "
                f"text: from character {place} it is {given!r} and becomes {came!r}"
            )
        proven[0] += 1
        proven[1] += text_bytes(document)


def first_difference(text: str, other: str) -> tuple[int, str, str]:
    """(Index of the first difference, SHOWN characters of each text from there)."""
    pairs = enumerate(zip(text, other, strict=False))
    place = next((at for at, (one, two) in pairs if one != two), min(len(text), len(other)))
    return place, text[place : place + SHOWN], other[place : place + SHOWN]


def round_trip_problem(settings: Settings, files: dict[str, list[File]]) -> str | None:
    """A problem if `tokenizer.file` does not restore one of the first documents that the rules keep; else None.

    Looked at: FILES_BEFORE files of each source, BYTES_BEFORE of text in all; the shards stage checks the rest. files:
    {source: its files}.
    """
    tokenizer = load(settings.tokenizer.file)
    encoder = Encoder(tokenizer)
    categories = {name: category_of(name, source) for name, source in settings.sources.items()}
    round_trip = RoundTrip(f"tokenizer.file={settings.tokenizer.file}", tokenizer, categories)
    unwritten = Path(settings.output)
    rules = ApplyRules(settings.rules.active(), settings.edits.active(), settings.language, unwritten, unwritten)
    for name, listed in files.items():
        chosen = listed[:: max(1, -(-len(listed) // FILES_BEFORE))]
        for file in chosen:
            left = BYTES_BEFORE // len(chosen)
            try:
                for document in documents_of(file, name, settings.sources[name]):
                    left -= text_bytes(document)
                    if rules.judge(document, []) is None:
                        round_trip.check(document, encoder.encode(document.text), always=True)
                    if left <= 0:
                        break
            except InputError as error:
                return str(error)
            except OSError:
                continue  # the rules stage, which reads it again, says what and where
    return None
