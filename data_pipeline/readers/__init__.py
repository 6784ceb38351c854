"""Where documents come from: datatrove reader steps, made from the settings of the sources."""

from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import Jsonl, Tree
from data_pipeline.readers.jsonl import jsonl_files, jsonl_reader
from data_pipeline.readers.tree import TreeReader, tree_files

__all__ = ["build_readers", "list_inputs"]


def build_readers(sources: dict[str, Tree | Jsonl]) -> list[PipelineStep]:
    """One reader a source; each passes on what the one before it read."""
    return [
        TreeReader(name, source) if isinstance(source, Tree) else jsonl_reader(name, source)
        for name, source in sources.items()
    ]


def list_inputs(sources: dict[str, Tree | Jsonl]) -> list[tuple[str, int]]:
    """(identity, bytes) of every input file. Raises InputError for a source that is missing, empty or too small."""
    return [
        entry
        for name, source in sources.items()
        for entry in (
            [(file.id, file.size) for file in tree_files(name, source)]
            if isinstance(source, Tree)
            else jsonl_files(name, source)
        )
    ]
