"""The pieces that stages are made of beside datatrove's own: all are datatrove steps, so its executors run them."""

import fcntl
import json
import os
from collections import defaultdict
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.document import text_bytes
from data_pipeline.edits import Editor
from data_pipeline.filters import BEFORE_EDITS, Drop, Filter, Language
from data_pipeline.filters.language import identifier
from data_pipeline.shards.manifest import replace_file

EXCERPT = 300  # characters of a dropped document that its record keeps


class HoldTask(PipelineStep):
    """First step of every stage: one process at a time works on a task.

    When a run is killed, its workers may live on for a while and write. They stop here before they take another task,
    and the next run's worker waits here until they are done with the last. The lock goes with the process, or when it
    takes its next task.
    """

    type = "🔒 - LOCK"
    name = "hold task"
    _held = None

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.runner = os.getpid()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / f"{rank:05d}").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
        HoldTask._held = lock
        if self.runner not in (os.getpid(), os.getppid()):
            os._exit(1)
        return data


class TaskReader(JsonlReader):
    """Reads what task `rank` of an earlier stage wrote, nothing if it wrote nothing.

    datatrove's own share of a folder is every world_size-th file; an empty task leaves no file, and all the others
    would then read their neighbour's, while duplicates are recorded by task and place.
    """

    name = "task output"

    def __init__(self, folder: Path):
        super().__init__(str(folder), compression=None, add_file_path=False)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        name = f"{rank:05d}.jsonl"
        if self.data_folder.isfile(name):
            yield from self.read_files_shard([name])


class TaskWriter(JsonlWriter):
    """Writes documents to the file of task `rank`, and passes them on."""

    name = "task output"

    def __init__(self, folder: Path):
        super().__init__(str(folder), output_filename="${rank}.jsonl", compression=None)


class Tally(PipelineStep):
    """Counts the documents that pass: folder/RANK.json holds [source, language, documents, bytes] for each pair."""

    type = "📊 - STATS"
    name = "tally"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        counts = defaultdict(lambda: [0, 0])
        for document in data:
            count = counts[document.metadata["source"], document.metadata.get("language", "")]
            count[0] += 1
            count[1] += text_bytes(document)
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [[*key, *count] for key, count in sorted(counts.items())]
        replace_file(self.folder / f"{rank:05d}.json", json.dumps(rows).encode())


class ApplyRules(PipelineStep):
    """Judges and edits each document: rules on the raw text, edits, rules for all languages, the language, rules for
    some languages. The first that objects has the document recorded and dropped; every edit of a document that stays is
    recorded in edits/RANK.jsonl: id, source, edit, measure, value, threshold, and the bytes before and after all edits.
    """

    type = "🔻 - FILTER"
    name = "rules"

    def __init__(
        self,
        rules: dict[str, Filter],
        edits: dict[str, Editor],
        language: Language | None,
        drops: Path,
        edited: Path,
    ):
        super().__init__()
        self.first = {name: rule for name, rule in rules.items() if name in BEFORE_EDITS}
        rest = {name: rule for name, rule in rules.items() if name not in BEFORE_EDITS}
        self.any_language = {name: rule for name, rule in rest.items() if not getattr(rule, "languages", ())}
        self.some_languages = {name: rule for name, rule in rest.items() if name not in self.any_language}
        self.edits = edits
        self.language = language
        self.drops = drop_writer(drops, rule_drop)
        self.edited = JsonlWriter(str(edited), output_filename="${rank}.jsonl", compression=None, adapter=_edit_record)
        if language:
            identifier()  # before the workers fork, so that they share it

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.drops as drops, self.edited as edited:
            for document in data:
                made, size = [], text_bytes(document)
                if found := self._judge(document, made):
                    name, drop = found
                    reason = {"measure": drop.measure, "value": drop.value, "threshold": drop.threshold}
                    document.metadata["drop"] = {"filter": name, **reason}
                    drops.write(document, rank)
                    continue
                for edit in made:
                    document.metadata["edit"] = {**edit, "bytes_before": size, "bytes_after": text_bytes(document)}
                    edited.write(document, rank)
                document.metadata.pop("edit", None)
                yield document

    def _judge(self, document: Document, made: list[dict]) -> tuple[str, Drop] | None:
        """Edits the document, noting in `made` how; returns the rule that drops it and why, or None."""
        for name, rule in self.first.items():
            if drop := rule(document.text):
                return name, drop
        for name, editor in self.edits.items():
            if edit := editor(document.text):
                document.text = edit.text
                made.append({"edit": name, "measure": edit.measure, "value": edit.value, "threshold": edit.threshold})
        for name, rule in self.any_language.items():
            if drop := rule(document.text):
                return name, drop
        if self.language and "language" not in document.metadata:
            document.metadata["language"], drop = self.language.judge(document.text)
            if drop:
                return "language", drop
        for name, rule in self.some_languages.items():
            if document.metadata.get("language", "") in rule.languages and (drop := rule(document.text)):
                return name, drop
        return None


def _edit_record(_, document: Document) -> dict:
    return {"id": document.id, "source": document.metadata["source"], **document.metadata["edit"]}


def drop_writer(folder: Path, reason) -> JsonlWriter:
    """Records dropped documents in folder/RANK.jsonl: id, source, bytes, what `reason(document)` gives (filter,
    measure, value, threshold), and how the text begins."""

    def record(_, document: Document) -> dict:
        identity = {"id": document.id, "source": document.metadata["source"], "bytes": text_bytes(document)}
        return {**identity, **reason(document), "excerpt": document.text[:EXCERPT]}

    return JsonlWriter(str(folder), output_filename="${rank}.jsonl", compression=None, adapter=record)


def rule_drop(document: Document) -> dict:
    return document.metadata["drop"]
