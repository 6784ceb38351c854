"""JSON lines."""

from pathlib import Path

from datatrove.io import get_datafolder
from datatrove.pipeline.readers import JsonlReader

from data_pipeline.config import Jsonl
from data_pipeline.errors import InputError


def jsonl_reader(name: str, source: Jsonl) -> JsonlReader:
    """datatrove's reader, giving documents ids that are unique across sources. Lines whose text is absent, empty or no
    string are skipped."""

    def adapt(_, line: dict, path: str, number: int) -> dict:
        text = line.get(source.text_key)
        place = line.get(source.id_key, f"{path}:{number}")
        return {
            "text": text if isinstance(text, str) else "",
            "id": f"{name}/{place}",
            "metadata": {"source": name},
        }

    return JsonlReader(source.path, glob_pattern=source.glob, adapter=adapt, add_file_path=False)


def jsonl_files(name: str, source: Jsonl) -> list[tuple[str, int]]:
    """(identity, bytes) of the files of a source; raises InputError when there are none."""
    if "://" not in source.path and not Path(source.path).is_dir():
        raise InputError(f"sources.{name}.path={source.path}: no such folder")
    folder = get_datafolder(source.path)
    files = [(f"{name}/{path}", folder.size(path)) for path in folder.list_files(glob_pattern=source.glob)]
    if not files:
        raise InputError(f"sources.{name}.path={source.path}: no file matches glob={source.glob}")
    return files
