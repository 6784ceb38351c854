"""Checks of a run's sources before anything is written."""

from pathlib import Path

from data_pipeline.readers.base import DAMAGED, UNEXPECTED, File
from data_pipeline.readers.lines import jsonl_keys
from data_pipeline.readers.parquet import parquet_keys
from data_pipeline.sources import Jsonl, Parquet, Source

FILES_LOOKED_AT = 5  # first files of a source from which keys are collected
SHOWN = 20  # keys in a message


def output_problem(name: str, source: Source, output: Path) -> str | None:
    """A problem if `output` lies inside the source, where the next run would read it as input; else None."""
    if "://" in source.path or source.path == "stdlib":
        return None
    root, place = Path(source.path).resolve(), output.resolve()
    if root.is_dir() and (place == root or root in place.parents):
        return f"output={output} lies inside sources.{name}.path={source.path}: it would be read as input"
    return None


def key_problem(name: str, source: Source, files: list[File]) -> str | None:
    """A problem, with the keys found, if the first records of the first files have no `text_key`; else None."""
    if not isinstance(source, Jsonl | Parquet):
        return None
    seen: dict[str, None] = {}
    for file in files[:FILES_LOOKED_AT]:
        seen |= dict.fromkeys(_keys(file, source))
    if not seen or source.text_key in seen:
        return None
    keys = ", ".join(list(seen)[:SHOWN])
    return f"sources.{name}.text_key={source.text_key}: no such key in {files[0].id}; there are {keys}"


def _keys(file: File, source: Jsonl | Parquet) -> list[str]:
    """The keys of a file's first records; empty for an unreadable file, which the run will report."""
    try:
        with file.open() as opened:
            return jsonl_keys(opened, source) if isinstance(source, Jsonl) else parquet_keys(opened)
    except (*DAMAGED, *UNEXPECTED, OSError):
        return []
