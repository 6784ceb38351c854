"""Shards on a remote file system, behind a bounded local cache that several processes may share.

A file is downloaded whole, under another name until its size and hash are right, and then renamed. When the cache is
full, the files that were not used for longest go; who has one open keeps reading it.
"""

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.sources import SCHEME, openable

logger = logging.getLogger(__name__)

CHUNK = 4 << 20
EVICTED = (".tar", ".npy")  # what the cache may lose; manifests, tokenizers and counts stay
LONGEST_WAIT = 30.0  # seconds between two attempts


def is_remote(path: str) -> bool:
    """Whether a path is a URL. Raises InputError for one that fsspec does not open, such as pipe:."""
    if not SCHEME.match(path):
        return False
    try:
        openable(path)
    except ValueError as error:
        raise InputError(f"manifest {path}: {error}") from None
    return True


class Absent(OSError):
    """A file that the remote folder does not have: trying again is of no use."""


@dataclass
class Remote:
    """Files of the folder `url`, cached in `folder`. `max_bytes`: of the cache; `attempts`: to download a file, waiting
    `first_wait` seconds after the first and twice as long after each other. Thread-safe and picklable."""

    url: str
    folder: Path
    max_bytes: int = 100_000_000_000
    attempts: int = 6
    first_wait: float = 0.5
    downloads: int = 0  # by this process, for tests and logs
    _asked: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_locks", "_guard", "_pool", "_asked")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._asked = set()
        self._start()

    def fetch(self, name: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        """The local copy of a file, downloaded if it is not there. Raises OSError when no attempt gave the file that
        `size` and `sha256` describe."""
        path = self.folder / name
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if not path.exists() or (size is not None and path.stat().st_size != size):
                self._download(name, path, size, sha256)
            with contextlib.suppress(FileNotFoundError):  # another download needed its room already
                os.utime(path)  # used now
        return path

    def open(self, name: str, *, size: int | None = None, sha256: str | None = None) -> FileIO:
        """`fetch`, opened: from then on no other download can take it away. Raises OSError."""
        for _ in range(self.attempts):
            with contextlib.suppress(FileNotFoundError):
                return FileIO(self.fetch(name, size=size, sha256=sha256))
        raise OSError(f"{self.url}/{name}: not there, or max_bytes={self.max_bytes} is too small for what is in use")

    def prefetch(self, wanted: list[tuple[str, int, str]]) -> None:
        """Begins to download files (name, size, sha256) that will soon be asked for, as many as fit into half of the
        cache; failures show when they are asked for."""
        room = itertools.accumulate(size for _, size, _ in wanted)
        wanted = [item for item, total in zip(wanted, room, strict=True) if total <= self.max_bytes // 2]
        with self._guard:
            new = [item for item in wanted if item[0] not in self._asked and not (self.folder / item[0]).exists()]
            self._asked.update(item[0] for item in new)
            if new and self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="prefetch")
        for name, size, sha256 in new:
            self._pool.submit(self._try, name, size, sha256)

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of the remote folder, by one listing."""
        filesystem, root = self._filesystem()
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in filesystem.ls(root, detail=True)}

    def _try(self, name: str, size: int, sha256: str) -> None:
        try:
            self.fetch(name, size=size, sha256=sha256)
        except OSError as error:
            logger.warning("prefetch of %s: %s", name, error)
        finally:
            with self._guard:
                self._asked.discard(name)

    def _filesystem(self):
        import fsspec

        return fsspec.core.url_to_fs(self.url)

    def _download(self, name: str, path: Path, size: int | None, sha256: str | None) -> None:
        # Waits of its own, so that ranks do not come back all at once, and without touching the global random state.
        generator, problem = random.Random(uuid.uuid4().int), None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(self.first_wait * 2 ** (attempt - 1), LONGEST_WAIT) * generator.uniform(0.5, 1.0))
            try:
                return self._attempt(name, path, size, sha256)
            except Absent:
                raise
            except Exception as error:  # each file system has errors of its own
                problem = error
                logger.warning("download of %s/%s, attempt %d: %s", self.url, name, attempt + 1, error)
        raise OSError(f"{self.url}/{name}: {self.attempts} attempts: {problem}")

    def _attempt(self, name: str, path: Path, size: int | None, sha256: str | None) -> None:
        filesystem, root = self._filesystem()
        if not filesystem.exists(f"{root}/{name}"):
            raise Absent(f"{self.url}/{name}: not there")
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.tmp"
        digest, written = hashlib.sha256(), 0
        try:
            self._make_room(temporary, filesystem.size(f"{root}/{name}") if size is None else size)
            with filesystem.open(f"{root}/{name}", "rb") as source, temporary.open("r+b") as target:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    written += target.write(chunk)
                target.truncate()
            if size is not None and written != size:
                raise OSError(f"{written} bytes came, the manifest says {size}")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise OSError("its sha256 is not the manifest's")
            with self._locked():  # a listing may miss a file that is renamed meanwhile
                os.replace(temporary, path)
            self.downloads += 1
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of this opening: lockf would let the threads of a process by
            yield

    def _make_room(self, temporary: Path, size: int) -> None:
        """Puts a file of `size` bytes in place of what is to come, so that other processes count it, and removes what
        was not used for longest until the cache is within its bound."""
        with self._locked():
            with temporary.open("wb") as file:
                file.truncate(size)
            files = list(_files(self.folder))
            total = sum(stat.st_size for _, stat in files)
            for path, stat in sorted(files, key=lambda item: item[1].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                if path.suffix in EVICTED:
                    path.unlink(missing_ok=True)
                    total -= stat.st_size


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a folder from which others may take some meanwhile."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


def default_cache(url: str) -> Path:
    """Where the shards of a URL are cached: under MEGATRON_TN_CACHE, or the user's cache folder."""
    base = os.environ.get("MEGATRON_TN_CACHE") or Path.home() / ".cache" / "megatron_tn"
    return Path(base) / hashlib.sha256(url.encode()).hexdigest()[:16]
