"""Atomic file replacement, and lock files.

Safe in shared folders: symbolic links in place of files are not followed, and temporary names are unpredictable.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import InputError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TEMPORARY = ".tmp"  # suffix of files being written


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A temporary file that is fsynced and renamed to `path` when the block ends: readers see the old or the new file.
    On an exception it is removed. `mode`: permissions, less the umask."""
    temporary, file = open_temporary(path, mode)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while the temporary file is still locked
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def open_temporary(path: Path, mode: int = 0o666) -> tuple[Path, BinaryIO]:
    """(Name, file) of a new temporary file beside `path`, open for writing and locked. Unlocked temporary files of the
    same `path`, left by killed writers, are removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        _remove_unlocked(left)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.fdopen(os.open(temporary, flags, mode), "wb")
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return temporary, file


def open_lock(path: Path) -> BinaryIO:
    """Opens a lock file, created if missing, never truncated. Raises OSError (ELOOP) if `path` is a symbolic link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "r+b")


def replace_file(path: Path, data: bytes) -> None:
    """Atomically replaces `path` by `data`."""
    with replacing(path) as file:
        file.write(data)


def once(path: Path, make: Callable[[], dict]) -> dict:
    """The result of `make()`, kept in `path` as JSON: a later call reads it there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        replace_file(path, json.dumps(make(), indent=1).encode() + b"\n")
    return json.loads(path.read_bytes())


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises InputError if it holds none."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
        problem = f"a {type(found).__name__} and no object"
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or str(error)
    raise InputError(f"{path} is damaged: {problem}")


def sha256_of(path: Path) -> str:
    """The sha256 of a whole file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: Exception, output: Path) -> str:
    """An error as one line; for a full disk, with the free space on the disk of `output`."""
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        free = shutil.disk_usage(output).free
        path = "" if error.filename else f": {output}"
        return f"{line}{path}; {free:,} bytes are free there"
    return f"{type(error).__name__}: {line}"


def _remove_unlocked(path: Path) -> None:
    """Removes a file unless its writer is alive and holds the lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
