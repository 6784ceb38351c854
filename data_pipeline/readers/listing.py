"""Lists the files of a source: below a local or remote folder, or a single file. Symbolic links are followed."""

import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datatrove.io import DataFolder, get_datafolder
from fsspec.utils import glob_translate

from data_pipeline.errors import InputError
from data_pipeline.readers.base import File, opener, printable
from data_pipeline.sources import Parquet, Source, Tree, Warc

SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Listing:
    """`files`, sorted by id; `notes`: lines about files that are not read."""

    files: list[File]
    notes: list[str]


@dataclass(frozen=True)
class Below:
    """`paths`: files, relative to the folder; `broken`: links without a target; `notes`: lines about skipped links."""

    paths: list[str]
    broken: list[str]
    notes: list[str]


def glob_listing(name: str, source: Source) -> Listing:
    """The files of a source that match its glob, or the single file of its path. Raises InputError when there is none,
    or a folder cannot be listed."""
    packed = None if isinstance(source, Warc | Parquet) else "infer"
    return _listing(name, source, re.compile(glob_translate(source.glob)).match, f"glob={source.glob}", packed)


def suffix_listing(name: str, source: Tree) -> Listing:
    """The files of a source with one of its suffixes, outside its excluded folders. Errors as in `glob_listing`."""
    fits = lambda path: path.endswith(source.suffixes)  # noqa: E731
    return _listing(name, source, fits, f"suffixes={' '.join(source.suffixes)}", "infer", frozenset(source.exclude))


def _listing(
    name: str,
    source: Source,
    fits: Callable[[str], object],
    asked: str,
    packed: str | None,
    exclude: frozenset[str] = frozenset(),
) -> Listing:
    where = f"sources.{name}.path={source.path}"
    try:
        folder, only = _open(source)
        below = Below([only], [], []) if only else _below(folder, exclude)
        found = sorted(path for path in below.paths if only or fits(path))
        if broken := sorted(filter(fits, below.broken)):
            raise InputError(f"links that lead nowhere: {_some(broken)}; remove or mend them")
        files = [
            File(f"{name}/{printable(path)}", opener(folder, path, source, packed), folder.size(path)) for path in found
        ]
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(*(f"{where}: {problem}" for problem in error.problems)) from None
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    other = sorted(set(below.paths) - set(found))
    if not files:
        there = f"; there are {_some(other)}" if other else ""
        raise InputError(f"{where}: no file matches {asked}{there}")
    notes = [f"{where}: {note}" for note in below.notes]
    if below.broken:
        notes.append(f"{where}: {len(below.broken)} links lead nowhere: {_some(below.broken)}")
    if other:
        notes.append(f"{where}: {len(other)} files are not read, they do not match {asked}: {_some(other)}")
    return Listing(files, notes)


def _some(paths: list[str]) -> str:
    return ", ".join(map(printable, paths[:SHOWN])) + (", ..." if len(paths) > SHOWN else "")


def _open(source: Source) -> tuple[DataFolder, str]:
    """(Folder, "") for a source's folder, or (parent folder, file name) for a single file. Raises InputError if `path`
    does not exist, because datatrove treats a missing folder as empty."""
    # fsspec's HTTP lists nothing for a path with a trailing slash; `/` and `memory://` keep theirs.
    path = re.sub("(?<=[^:/])/+$", "", source.path)
    folder = get_datafolder(path)
    if folder.fs.isdir(folder.path):
        return folder, ""
    if not folder.fs.isfile(folder.path):
        raise InputError("no such folder or file")
    parent, _, file = path.rpartition("/")
    return get_datafolder(parent or ("/" if path.startswith("/") else ".")), file


def _below(folder: DataFolder, exclude: frozenset[str]) -> Below:
    """The files below a folder, outside folders named in `exclude`. Raises OSError for a local folder that cannot be
    listed, which fsspec would skip silently."""
    if folder.is_local():
        return files_below(Path(folder.path), exclude)
    return Below([path for path in folder.list_files() if not set(path.split("/")[:-1]) & exclude], [], [])


def files_below(root: Path, exclude: frozenset[str]) -> Below:
    """The files below a local folder. Symbolic links are followed last, those to folders before those to files, which
    may lie in these folders; a link to an already listed file or folder is skipped with a note. Raises OSError for a
    folder that cannot be listed."""
    paths, notes, broken, followed, others = [], [], [], [], []
    seen: set[tuple[int, int]] = {_identity(root)}
    folders, folder_links, links = [root], deque(), deque()
    while folders or folder_links or links:
        if not folders:
            link = (folder_links or links).popleft()
            try:
                found = link.stat()
            except OSError:
                broken.append(link.relative_to(root).as_posix())
                continue
            if (found.st_dev, found.st_ino) in seen:
                notes.append(f"link {printable(str(link.relative_to(root)))} leads to something already read: skipped")
                continue
            seen.add((found.st_dev, found.st_ino))
            followed.append(f"{link.relative_to(root)} -> {link.resolve()}")
            if stat.S_ISREG(found.st_mode):
                paths.append(link.relative_to(root).as_posix())
                continue
            if not stat.S_ISDIR(found.st_mode):
                others.append(link.relative_to(root).as_posix())
                continue
            folders = [link]
        for entry in _entries(folders.pop()):
            path = Path(entry.path)
            if entry.is_symlink():
                if entry.name not in exclude:
                    (folder_links if path.is_dir() else links).append(path)
            elif entry.is_dir():
                if entry.name not in exclude:
                    folders.append(path)
                    seen.add(_identity(path))
            elif entry.is_file():
                paths.append(path.relative_to(root).as_posix())
                seen.add((entry.stat().st_dev, entry.inode()))
            else:
                others.append(path.relative_to(root).as_posix())
    if followed:
        notes.append(f"{len(followed)} links are followed: {_some(followed)}")
    if others:
        notes.append(f"{len(others)} pipes, sockets and devices are not read: {_some(others)}")
    return Below(paths, broken, notes)


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
