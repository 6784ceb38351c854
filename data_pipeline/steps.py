"""The pieces that stages are made of beside datatrove's own: all are datatrove steps, so its executors run them."""

import errno
import fcntl
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.document import text_bytes
from data_pipeline.edits import Editor
from data_pipeline.errors import StageError
from data_pipeline.files import replace_file, replacing
from data_pipeline.filters import BEFORE_EDITS, Drop, Filter, Language
from data_pipeline.filters.language import identifier

MARKER_SECONDS = 60  # how late a shared file system may show the markers of the stage before
EXCERPT = 300  # characters of a dropped document that its record keeps


class BeginTask(PipelineStep):
    """First step of every stage: sees that the stage before is complete, and holds the task for this process.

    The markers are what the executors' own dependencies rely on; a cluster that lost a part of an array in between must
    not make a stage run on half its input. The lock goes with the process, or when it takes its next task: workers of a
    killed run may live on for a moment, and the next run's worker waits here until they are done.
    """

    type = "🔒 - LOCK"
    name = "begin task"
    _held = None

    def __init__(self, stage: Path, before: Path | None = None, tasks_before: int = 0):
        super().__init__()
        self.stage = stage
        self.before = before
        self.tasks_before = tasks_before

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self._see_stage_before()
        (self.stage / "locks").mkdir(parents=True, exist_ok=True)
        lock = (self.stage / "locks" / f"{rank:05d}").open("w")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError as error:  # a shared file system without locks: there SLURM alone starts the tasks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        BeginTask._held = lock
        return data

    def _see_stage_before(self) -> None:
        for attempt in range(MARKER_SECONDS):
            if not self.before or not (missing := missing_tasks(self.before, self.tasks_before)):
                return
            time.sleep(attempt and 1)
        raise StageError(f"stage {self.before.name}: {len(missing)} tasks are not complete, the first is {missing[0]}")


def missing_tasks(stage: Path, tasks: int) -> list[int]:
    """The tasks of a stage's folder that have no completion marker."""
    folder = stage / "completions"
    done = set(os.listdir(folder)) if folder.is_dir() else set()
    return [rank for rank in range(tasks) if f"{rank:05d}" not in done]


class TaskReader(PipelineStep):
    """Reads what task `rank` of an earlier stage wrote: duplicates are recorded by task and place in the task's file.
    A file that is not there or not whole is an error, where datatrove's own reader would go on without it."""

    type = "📖 - READER"
    name = "task output"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from read_documents(self.folder / f"{rank:05d}.jsonl")


def read_documents(path: Path) -> Iterator[Document]:
    """The documents that a TaskWriter wrote to `path`."""
    with path.open("rb") as lines:
        for line in lines:
            record = orjson.loads(line)
            yield Document(text=record["text"], id=record["id"], metadata=record["metadata"])


class TaskWriter(PipelineStep):
    """Writes documents to the file of task `rank`, empty when there are none, and passes them on."""

    type = "💽 - WRITER"
    name = "task output"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{rank:05d}.jsonl") as file:
            for document in data:
                record = {"text": document.text, "id": document.id, "metadata": document.metadata}
                file.write(orjson.dumps(record) + b"\n")
                yield document


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


def read_tally(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """{(source, language): (documents, bytes)} over all tasks of a Tally."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for path in sorted(folder.glob("*.json")):
        for source, language, documents, size in json.loads(path.read_bytes()):
            before = counts.get((source, language), (0, 0))
            counts[source, language] = (before[0] + documents, before[1] + size)
    return counts


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
