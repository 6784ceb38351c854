"""Files of a remote folder, downloaded whole into the node's cache (`data_pipeline.shards.cache`).

A download has a temporary name until size and hash are verified. It is limited to the size in the manifest and fails
below a minimum rate; failed downloads are retried with exponential backoff.
"""

import contextlib
import errno
import itertools
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from data_pipeline.errors import InputError
from data_pipeline.files import sha256_of
from data_pipeline.locations import SCHEME, openable
from data_pipeline.redaction import redacted
from data_pipeline.shards.cache import Cache, CacheFull

logger = logging.getLogger(__name__)

ATTEMPTS: ContextVar[int] = ContextVar("ATTEMPTS", default=8)  # tries per download, of folders opened from now on
LONGEST_WAIT = 30.0  # seconds between two attempts
STALLED = 60.0  # seconds: HTTP read timeout, and the window in which LEAST_RATE is measured
LEAST_RATE = 10_000  # bytes per second; slower downloads fail
MOST_UNSIZED = 1 << 30  # maximum bytes of a file without a size in the manifest
ASKING = 16  # concurrent requests for file sizes


def is_remote(path: str) -> bool:
    """Whether a path is a URL. Raises InputError for one that fsspec does not open, such as pipe:."""
    if not SCHEME.match(path):
        return False
    try:
        openable(path)
    except ValueError as error:
        raise InputError(f"manifest={path}: {error}") from None
    return True


class _Watch(Callback):
    """fsspec callback for each piece of a download. Raises OSError when it exceeds `most` bytes, or receives less than
    LEAST_RATE x STALLED bytes in STALLED seconds."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most
        self.came = self.before = 0  # bytes received, now and at the window's beginning
        self.since = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        self.came += inc
        if self.came > self.most:
            raise OSError(f"more than {self.most} bytes came: stopped")
        if (seconds := time.monotonic() - self.since) > STALLED:
            if self.came - self.before < LEAST_RATE * seconds:
                raise OSError(
                    f"{self.came - self.before} bytes in {seconds:.0f} s, below {LEAST_RATE} bytes/s: stopped"
                )
            self.since, self.before = time.monotonic(), self.came


@contextlib.contextmanager
def few_attempts() -> Iterator[None]:
    """Context manager: three tries per download, for a person who waits for the answer: eight tries of a server that
    does not answer take a minute."""
    before = ATTEMPTS.set(3)
    try:
        yield
    finally:
        ATTEMPTS.reset(before)


@dataclass
class Remote:
    """Files of the folder `url`, cached in `cache`. `attempts`: tries per download, with waits of `first_wait` seconds,
    doubled each time. Thread-safe and picklable."""

    url: str
    cache: Cache
    query: str = ""  # appended to every file's URL, with its `?`: a signature that holds for the whole folder
    attempts: int = field(default_factory=ATTEMPTS.get)
    first_wait: float = 0.5
    folder: Path = field(init=False)  # cache folder of this URL's files without a known hash
    _asked: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self):
        self.folder = self.cache.create(self.url)
        self._start()

    def _start(self) -> None:
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __str__(self) -> str:
        return redacted(self.url)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_locks", "_guard", "_pool", "_asked")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._asked = set()
        self._start()

    def place(self, name: str, sha256: str | None) -> Path:
        """The path of a file in the cache."""
        return self.cache.content(name, sha256) if sha256 else self.folder / name

    def fetch(
        self,
        name: str,
        *,
        size: int | None = None,
        sha256: str | None = None,
        most: int = MOST_UNSIZED,
        fresh: bool = False,
        attempts: int | None = None,
    ) -> Path:
        """The local copy of a file, downloaded if missing or `fresh`. `size`: bytes, if known; `most`: otherwise, the
        download's limit. Raises FileNotFoundError when the server has no such file, OSError when no attempt gave a file
        of this `size` and `sha256`, CacheFull."""
        path = self.place(name, sha256)
        with self._guard:
            lock = self._locks.setdefault(path.name, threading.Lock())
        with lock:
            if fresh or not path.exists() or (size is not None and path.stat().st_size != size):
                self._retry(name, lambda: self._attempt(name, path, size, sha256, most), attempts)
            with contextlib.suppress(FileNotFoundError):  # another download needed its room already
                os.utime(path)  # marks it as recently used
        return path

    def open(
        self, name: str, *, size: int | None = None, sha256: str | None = None, most: int = MOST_UNSIZED
    ) -> FileIO:
        """`fetch` and open: the open file stays readable when the cache removes it. Raises OSError."""
        for _ in range(self.attempts):
            path = self.fetch(name, size=size, sha256=sha256, most=most)
            with contextlib.suppress(FileNotFoundError):  # another download needed its room already
                return FileIO(path)
        raise OSError(f"{self}/{name}: {self.cache} is too small for the files in use")

    def prefetch(self, wanted: list[tuple[str, int, str]]) -> None:
        """Starts downloads of files (name, size, sha256), as many as fit into half of the cache. Errors are raised by a
        later `fetch`."""
        room = itertools.accumulate(size for _, size, _ in wanted)
        wanted = [item for item, total in zip(wanted, room, strict=True) if total <= self.cache.max_bytes // 2]
        with self._guard:
            new = [item for item in wanted if item[2] not in self._asked and not self.place(item[0], item[2]).exists()]
            self._asked.update(item[2] for item in new)
            if new and self._pool is None:
                self._pool = ThreadPoolExecutor(2, thread_name_prefix="prefetch")
        for name, size, sha256 in new:
            self._pool.submit(self._try, name, size, sha256)

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """{name: bytes, None if unknown} of the remote folder's files, at least of those in `names`: by one listing or,
        if listings have no sizes, as over HTTP, by a request per file of `names`. Raises OSError."""
        filesystem, root = self._filesystem()
        try:
            listing = [] if self._is_http() else self._retry("", lambda: filesystem.ls(root, detail=True))
        except (OSError, NotImplementedError):
            listing = []
        found = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listing}
        unknown = [name for name in names if found.get(name) is None] if None in found.values() or not found else []
        with ThreadPoolExecutor(ASKING) as pool:
            answers = pool.map(self._size, unknown)
            found |= {name: size for name, (there, size) in zip(unknown, answers, strict=True) if there}
        return found

    def _size(self, name: str) -> tuple[bool, int | None]:
        """(Whether a file exists, its bytes or None if unknown)."""
        filesystem, root = self._filesystem()
        try:
            return True, self._retry(name, lambda: filesystem.info(f"{root}/{name}{self.query}").get("size"))
        except FileNotFoundError:
            return False, None

    def names(self) -> list[str]:
        """Names in the remote folder; empty if it cannot be listed. Of HTTP no page of links is read: fsspec would take
        one of any length, in the square of its time."""
        if self._is_http():
            return []
        filesystem, root = self._filesystem()
        filesystem.invalidate_cache(root)  # a cached listing lacks new files
        with contextlib.suppress(Exception):
            return [entry.rpartition("/")[2] for entry in filesystem.ls(root, detail=False)]
        return []

    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def put(self, name: str) -> None:
        """Uploads a file of the cache to the remote folder. Raises the file system's errors."""
        filesystem, root = self._filesystem()
        data = (self.folder / name).read_bytes()
        self._retry(name, lambda: filesystem.pipe_file(f"{root}/{name}{self.query}", data))

    def _try(self, name: str, size: int, sha256: str) -> None:
        try:
            # One attempt: the reader's `fetch` retries, and an exiting process does not wait for retries.
            self.fetch(name, size=size, sha256=sha256, attempts=1)
        except (OSError, CacheFull) as error:
            logger.warning("prefetch of %s: %s", name, redacted(str(error)))
        finally:
            with self._guard:
                self._asked.discard(sha256)

    def _filesystem(self):
        import fsspec

        options = {}
        if self._is_http():
            try:
                from aiohttp import ClientTimeout
            except ImportError:
                raise InputError(f"manifest in {self}: needs the package aiohttp (pip install aiohttp)") from None
            # By default aiohttp limits the whole download to five minutes.
            options["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=STALLED, sock_read=STALLED)}
        try:
            return fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            raise InputError(f"manifest in {self}: {error}") from None

    def _retry(self, name: str, attempt: Callable[[], Any], attempts: int | None = None) -> Any:
        """The result of `attempt()`, retried with exponential backoff. Raises FileNotFoundError without a retry, and
        OSError when all attempts failed."""
        # Random waits, so that ranks do not retry at the same time; the global random state is not used.
        generator, problem = random.Random(uuid.uuid4().int), None
        attempts = attempts or self.attempts
        for number in range(attempts):
            if number:
                time.sleep(min(self.first_wait * 2 ** (number - 1), LONGEST_WAIT) * generator.uniform(0.5, 1.0))
            try:
                return attempt()
            except (CacheFull, InputError, NotImplementedError, PermissionError):
                raise
            except Exception as error:  # each fsspec file system has its own errors
                if _says_absent(error):
                    raise FileNotFoundError(errno.ENOENT, "not there", f"{self}/{name}") from None
                problem = error
                line = redacted(f"{type(error).__name__}: {error}")
                logger.warning("%s/%s, attempt %d: %s", self, name, number + 1, line)
        raise OSError(f"{self}/{name}: {attempts} attempts: {redacted(str(problem)) or type(problem).__name__}")

    def _attempt(self, name: str, path: Path, size: int | None, sha256: str | None, most: int) -> None:
        filesystem, root = self._filesystem()
        most = most if size is None else size
        with self.cache.receiving(path, most if most < MOST_UNSIZED else 0) as temporary:
            try:
                watch = _Watch(most)
                if self.url.startswith("file:"):  # its get_file does not call the callback
                    watch.relative_update(filesystem.size(f"{root}/{name}{self.query}"))
                filesystem.get_file(f"{root}/{name}{self.query}", str(temporary), callback=watch)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not self.cache.make_room(at_least=size or 1):
                    place = f"cache {self.cache.folder}"
                    raise CacheFull(f"{place}: {error.strerror}, and nothing in it can be removed") from None
                raise
            if size is not None and (written := temporary.stat().st_size) != size:
                raise OSError(f"{written} bytes came, the manifest says {size}")
            if sha256 is not None and sha256_of(temporary) != sha256:
                raise OSError("its sha256 is not the manifest's")
            self.cache.publish(temporary, path)


def _says_absent(error: BaseException) -> bool:
    """Whether an error means that a file does not exist. fsspec's HTTP raises FileNotFoundError for any failed size
    request: then its cause, the server's answer, decides."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    return cause is None or getattr(cause, "status", None) in (404, 410)
