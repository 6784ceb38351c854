"""Files that are whole or not there."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when the body ends, complete and durable: readers see the old file or
    the new one. When the body fails nothing of it is left."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def open_lock(path: Path) -> BinaryIO:
    """A lock file, made if it is missing and never emptied. Raises OSError (ELOOP) where `path` is a symbolic link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "r+b")


def replace_file(path: Path, data: bytes) -> None:
    """Writes `data` as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


def sha256_of(path: Path) -> str:
    """The sha256 of a whole file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: Exception, output: Path) -> str:
    """An error as one line; of one for want of room, with how much there is on the disk of `output`."""
    line = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        free = shutil.disk_usage(output).free
        path = "" if error.filename else f": {output}"
        return f"{line}{path}; {free:,} bytes are free there"
    return f"{type(error).__name__}: {line}"
