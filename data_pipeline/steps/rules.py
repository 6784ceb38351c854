"""Applies rules, edits and language identification to each document."""

from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.document import text_bytes
from data_pipeline.edits import Editor, make_edits
from data_pipeline.filters import Drop, Filter
from data_pipeline.filters.language import Language, identifier
from data_pipeline.measures import kinds
from data_pipeline.steps.drops import drop_writer, rule_drop


class ApplyRules(PipelineStep):
    """Per document, in order: rules on the raw text, edits, rules for all languages, language identification, rules for
    some languages. The first rule that applies drops and records the document. Every edit of a kept document is
    recorded in edits/RANK.jsonl: id, source, edit, measure, value, threshold, and bytes before and after all edits.
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
        self.first = {name: rule for name, rule in rules.items() if getattr(rule, "before_edits", False)}
        rest = {name: rule for name, rule in rules.items() if name not in self.first}
        self.any_language = {name: rule for name, rule in rest.items() if not getattr(rule, "languages", ())}
        self.some_languages = {name: rule for name, rule in rest.items() if name not in self.any_language}
        self.edits = edits
        self.language = language
        self.drops = drop_writer(drops, rule_drop)
        self.edited = JsonlWriter(str(edited), output_filename="${rank}.jsonl", compression=None, adapter=_edit_record)
        if language:
            identifier()  # loaded before the fork, so that workers share it
        kinds()

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.drops as drops, self.edited as edited:
            for document in data:
                made, size = [], text_bytes(document)
                if found := self.judge(document, made):
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

    def judge(self, document: Document, made: list[dict]) -> tuple[str, Drop] | None:
        """Edits the document and appends records of the edits to `made`; returns (rule, Drop), or None to keep it."""
        for name, rule in self.first.items():
            if drop := rule(document.text):
                return name, drop
        document.text, edits = make_edits(self.edits, document.text)
        for name, edit in edits.items():
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
