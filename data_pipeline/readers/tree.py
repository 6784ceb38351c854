"""Trees of source code or text: each file a document."""

import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import Tree
from data_pipeline.errors import InputError


@dataclass(frozen=True)
class File:
    """`id`: source name and path within the source; `size` in bytes."""

    id: str
    path: Path
    size: int


class TreeReader(PipelineStep):
    """Reads every file of a source as UTF-8. Undecodable bytes become U+FFFD, for the rule on garbled text to judge."""

    type = "📖 - READER"
    name = "tree"

    def __init__(self, name: str, source: Tree):
        super().__init__()
        self.source_name = name
        self.source = source

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from data or ()
        for file in tree_files(self.source_name, self.source)[rank::world_size]:
            text = file.path.read_bytes().decode("utf-8", errors="replace").removeprefix("\ufeff")
            if text:
                yield Document(text=text, id=file.id, metadata={"source": self.source_name})


def tree_files(name: str, source: Tree) -> list[File]:
    """The files of a source, sorted. Raises InputError when the folder is absent, empty or under `minimum_bytes`."""
    root = Path(sysconfig.get_path("stdlib") if source.path == "stdlib" else source.path)
    if not root.is_dir():
        raise InputError(f"sources.{name}.path={source.path}: no such folder")
    files = list(_walk(root, f"{name}/", source))
    absent = []
    for package in source.fill:
        if sum(file.size for file in files) >= source.minimum_bytes:
            break
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            absent.append(package)
            continue
        files += _walk(Path(spec.submodule_search_locations[0]), f"{name}/{package}:", source)
    if not files:
        raise InputError(f"sources.{name}.path={root}: no file ends in {' '.join(source.suffixes)}")
    if (total := sum(file.size for file in files)) < source.minimum_bytes:
        missing = ["the standard library's test package"] if source.path == "stdlib" else []
        missing = [m for m in missing if not (root / "test").is_dir()] + [f"package {package}" for package in absent]
        raise InputError(
            f"sources.{name}.minimum_bytes={source.minimum_bytes}: only {total} bytes found in {root}"
            + (f"; missing here: {', '.join(missing)}" if missing else "")
        )
    return sorted(files, key=lambda file: file.id)


def _walk(root: Path, prefix: str, source: Tree) -> Iterator[File]:
    for folder, folders, names in os.walk(root):
        folders[:] = [entry for entry in folders if entry not in source.exclude]
        for entry in names:
            path = Path(folder, entry)
            # A link may lead out of the tree, or name a file of it twice.
            if entry.endswith(source.suffixes) and path.is_file() and not path.is_symlink():
                yield File(prefix + path.relative_to(root).as_posix(), path, path.stat().st_size)
