"""A node's cache of remote shards: one folder for all URLs, with a size limit, shared by all processes.

    FOLDER/content/SHA256.tar, .npy   a file with a hash in the manifest, from any URL
    FOLDER/ADDRESS/NAME               any other file of a URL (manifest, tokenizer, counts)

A corpus republished at the same URL has other hashes, so old and new files are not confused. When the cache is full,
the least recently used shards and indexes are removed; processes with an open file keep reading it. A download counts
with its final size from the start: a sparse file of that length, locked by its writer, reserves the space.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.files import TEMPORARY, open_lock

EVICTED = (".tar", ".npy")  # suffixes that may be removed; manifests, tokenizers and counts stay
ROOM = ".room"  # suffix of the sparse files that reserve space


class CacheFull(Exception):
    """The cache's disk is full. Not an OSError, which callers treat as damaged data."""


@dataclass(frozen=True)
class Cache:
    """`max_bytes`: limit of all files in `folder`."""

    folder: Path
    max_bytes: int

    def create(self, url: str) -> Path:
        """Creates the folders for files of `url`; returns the one for files without a known hash."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        address = self.folder / hashlib.sha256(url.encode()).hexdigest()[:16]
        for folder in (address, self.folder / "content"):
            folder.mkdir(exist_ok=True)
        return address

    def content(self, name: str, sha256: str) -> Path:
        """The path of a file with a known hash; names and sizes do not identify a file."""
        return self.folder / "content" / f"{sha256}{Path(name).suffix}"

    @contextlib.contextmanager
    def receiving(self, path: Path, size: int) -> Iterator[Path]:
        """Reserves `size` bytes and yields the temporary path for the download of `path`; `publish` renames it."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}")
        room = temporary.with_suffix(ROOM)
        with self._locked():
            held = open_lock(room)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with held:
            try:
                held.truncate(size)
                self.make_room()
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
                room.unlink(missing_ok=True)

    def publish(self, temporary: Path, path: Path) -> None:
        """Renames a downloaded file to `path` and removes its reservation."""
        with self._locked():  # a concurrent listing may miss a renamed file
            os.replace(temporary, path)
            temporary.with_suffix(ROOM).unlink(missing_ok=True)

    def make_room(self, *, at_least: int = 0) -> int:
        """Removes the least recently used files until the cache is within its limit and at least `at_least` bytes are
        removed. Returns the number of bytes removed."""
        freed = 0
        with self._locked():
            files = [(path, stat) for path, stat in self._counted()]
            total = sum(stat.st_size for _, stat in files)
            for path, stat in sorted(files, key=lambda item: item[1].st_mtime_ns):
                if total - freed <= self.max_bytes and freed >= at_least:
                    break
                if path.suffix in EVICTED:
                    path.unlink(missing_ok=True)
                    freed += stat.st_size
        return freed

    def _counted(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Files that count towards the limit. Partial downloads of killed processes are removed."""
        for path, stat in files_of(self.folder):
            if path.suffix == ROOM and _is_abandoned(path):
                path.with_suffix(TEMPORARY).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            elif path.suffix != TEMPORARY:
                yield path, stat

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = open_lock(path := self.folder / ".lock")
        except OSError as error:
            raise InputError(f"manifest: cache {path}: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # flock, because lockf does not exclude threads of one process
            yield


def files_of(cache: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a cache, of all URLs, without files that other processes remove during the listing."""
    for folder in cache.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.lstat()


def default_cache() -> Path:
    """The node's cache folder: MEGATRON_TN_CACHE, or else in the user's cache folder."""
    return Path(os.environ.get("MEGATRON_TN_CACHE") or Path.home() / ".cache" / "megatron_tn")


def _is_abandoned(room: Path) -> bool:
    """Whether the downloading process has ended and its lock is free."""
    try:
        with open_lock(room) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
