"""The cache of remote shards on a node: one folder for all addresses, of a bounded size, shared by its processes.

    FOLDER/content/SHA256.tar, .npy   a file whose hash the manifest gives, of any address
    FOLDER/ADDRESS/NAME               any other file of an address (manifest, tokenizer, counts)

A corpus that is published again at its address has other hashes, so no file of the old one is taken for the new one's.
When the cache is full, the least recently used shards and indexes are removed; a process that has one open keeps
reading it. What is being downloaded counts with its whole size: an empty file of that length, locked by its writer,
stands for it.
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
ROOM = ".room"  # the suffix of the empty files


class CacheFull(Exception):
    """The disk of the cache is full. No OSError: it says nothing of the data, and must not be taken for damage."""


@dataclass(frozen=True)
class Cache:
    """`max_bytes`: of all that lies in `folder`."""

    folder: Path
    max_bytes: int

    def create(self, url: str) -> Path:
        """Makes the folders that files of an address need; returns the one for files without a known hash."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        address = self.folder / hashlib.sha256(url.encode()).hexdigest()[:16]
        for folder in (address, self.folder / "content"):
            folder.mkdir(exist_ok=True)
        return address

    def content(self, name: str, sha256: str) -> Path:
        """Where a file of known hash lies: equal names and sizes prove nothing."""
        return self.folder / "content" / f"{sha256}{Path(name).suffix}"

    @contextlib.contextmanager
    def receiving(self, path: Path, size: int) -> Iterator[Path]:
        """Makes room for `size` bytes, and gives the temporary path to which `path` is to be downloaded; `publish` is
        what keeps it."""
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
        """Gives a downloaded file its name; with it goes what stood for it."""
        with self._locked():  # a listing may miss a file that is renamed meanwhile
            os.replace(temporary, path)
            temporary.with_suffix(ROOM).unlink(missing_ok=True)

    def make_room(self, *, at_least: int = 0) -> int:
        """Removes the least recently used files until the cache is within its bound and `at_least` so many bytes are
        gone. Returns how many went."""
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
        """What takes room. What a killed process was downloading is removed."""
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
            raise InputError(f"cache {path}: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of this opening: lockf would let the threads of a process by
            yield


def files_of(cache: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a cache, of all addresses. Other processes may remove some meanwhile: those are left out."""
    for folder in cache.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.lstat()


def default_cache() -> Path:
    """The node's cache: MEGATRON_TN_CACHE, or else the user's cache folder."""
    return Path(os.environ.get("MEGATRON_TN_CACHE") or Path.home() / ".cache" / "megatron_tn")


def _is_abandoned(room: Path) -> bool:
    """Whether the process that was downloading is gone, and its lock with it."""
    try:
        with open_lock(room) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
