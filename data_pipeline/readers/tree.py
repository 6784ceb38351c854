"""Trees of source code, text or pages: each file a document."""

import functools
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from datatrove.io import get_datafolder

from data_pipeline.errors import InputError
from data_pipeline.readers.base import (
    File,
    Found,
    Items,
    Quarantined,
    list_folder,
    no_folder,
    open_folder,
    opener,
    printable,
    too_large,
    walk,
)
from data_pipeline.readers.html import SUFFIXES, page_text
from data_pipeline.sources import Tree

COMPRESSED = (".gz", ".zst")


def read_file(file: BinaryIO, source: Tree, name: str) -> Items:
    """The one document of a file. Undecodable bytes become U+FFFD, for the rule on garbled text to judge."""
    data = file.read(source.max_document_bytes + 1)
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if len(data) > source.max_document_bytes:
        yield too_large("", len(data), source)
    elif name.lower().endswith(SUFFIXES):
        yield page_text(data, None, "", source)
    elif not (text := data.decode("utf-8", errors="replace").removeprefix("\ufeff")) or text.isspace():
        yield Quarantined("", "empty", "the file is empty", len(data))
    else:
        yield Found("", text)


def tree_files(name: str, source: Tree) -> list[File]:
    """The files of a source, sorted. Raises InputError when the folder is absent, empty or under `minimum_bytes`."""
    if "://" in source.path:
        return _remote_files(name, source)
    root = Path(sysconfig.get_path("stdlib") if source.path == "stdlib" else source.path)
    if not root.is_dir():
        raise no_folder(name, source, file=root.is_file())
    try:
        files = list(_walk(root, f"{name}/", source))
    except OSError as error:
        raise InputError(f"sources.{name}.path={source.path}: {error}") from None
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
    here = get_datafolder("/")
    for folder, folders, names in walk(root):
        folders[:] = [entry for entry in folders if entry not in source.exclude]
        for entry in names:
            path = Path(folder, entry)
            # A link may lead out of the tree, or name a file of it twice.
            if entry.endswith(source.suffixes) and path.is_file() and not path.is_symlink():
                open_it = (
                    opener(here, str(path.absolute()), source)
                    if path.suffix in COMPRESSED
                    else functools.partial(path.open, "rb")
                )
                yield File(prefix + printable(path.relative_to(root).as_posix()), open_it, path.stat().st_size)


def _remote_files(name: str, source: Tree) -> list[File]:
    try:
        folder = open_folder(name, source)
        paths = [path for path in list_folder(folder) if path.endswith(source.suffixes)]
        paths = sorted(path for path in paths if not set(path.split("/")) & set(source.exclude))
        files = [File(f"{name}/{path}", opener(folder, path, source), folder.size(path)) for path in paths]
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"sources.{name}.path={source.path}: {' '.join(str(error).split())}") from None
    if not files:
        raise InputError(f"sources.{name}.path={source.path}: no file ends in {' '.join(source.suffixes)}")
    if (total := sum(file.size for file in files)) < source.minimum_bytes:
        raise InputError(f"sources.{name}.minimum_bytes={source.minimum_bytes}: only {total} bytes in {source.path}")
    return files
