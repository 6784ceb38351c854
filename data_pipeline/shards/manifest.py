"""Reads and writes manifest.json (types: `content`) and checks it against the files of its folder."""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data_pipeline.errors import InputError
from data_pipeline.files import replace_file, sha256_of
from data_pipeline.shards.cache import Cache, CacheFull, default_cache
from data_pipeline.shards.content import (
    CONTENT,
    FORMAT,
    VERSION,
    Content,
    Shard,
    SourceInfo,
    TokenizerInfo,
    Totals,
    contradictions,
    token_dtype,
    total,
)
from data_pipeline.shards.remote import MOST_UNSIZED, Remote, is_remote

ROOM = 4  # minimum of a cache in shards: two prefetched, one requested, one in use


@dataclass(frozen=True)
class Manifest:
    """A checked manifest and its folder; for a manifest from a URL, `remote` and its cache folder. Make one with `load`
    or `create`."""

    content: Content
    directory: Path
    remote: Remote | None = None

    @classmethod
    def create(
        cls,
        directory: str | Path,
        tokenizer: TokenizerInfo,
        shards: list[Shard],
        sources: dict[str, SourceInfo] | None = None,
    ) -> "Manifest":
        """A manifest of `shards` in `directory`, with the `sources` that have a shard. Raises InputError when the
        shards contradict each other."""
        known = sources or {}
        content = Content(
            format=FORMAT,
            version=VERSION,
            tokenizer=tokenizer,
            dtype=token_dtype(tokenizer.vocab_size),
            sources={name: known.get(name, SourceInfo()) for name in sorted({shard.source for shard in shards})},
            shards=tuple(shards),
            totals=total(shards),
        )
        _refuse(f"shards in {directory}", contradictions(content))
        return cls(content, Path(directory))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        check_files: bool = True,
        cache: str | Path | None = None,
        cache_bytes: int = 100_000_000_000,
    ) -> "Manifest":
        """Reads and checks `path`. With `check_files`, the tokenizer must have the recorded hash, every shard and index
        must exist, and every shard have its recorded size (one stat per file; `verify` reads and hashes them). An
        fsspec URL is read through `cache`, a local folder (see `cache.default_cache`) that manifests share, of at most
        `cache_bytes` in all. Raises InputError naming each bad file."""
        remote, name = _open_remote(str(path), cache, cache_bytes)
        path = Path(path) if remote is None else remote.folder / name
        try:
            written = path.read_bytes()
            content = CONTENT.validate_json(written)
        except IsADirectoryError:
            inside = path / "manifest.json"
            name = f"file {inside}" if _may_be_ours(inside) else "manifest.json of shards"
            raise InputError(f"manifest={path}: it is a folder; name the {name}") from None
        except OSError as error:
            raise InputError(f"manifest={path}: {error.strerror or error}") from None
        except ValidationError as error:
            if (found := _format(written)) is not None and found != FORMAT:
                raise InputError(
                    f"manifest={path}: format={found!r} is not {FORMAT!r}: no manifest of shards"
                ) from None
            raise InputError(
                *(
                    f"manifest={path}: {'.'.join(map(str, e['loc'])) or 'document'}={_short(e['input'])}: {e['msg']}"
                    for e in error.errors()
                )
            ) from None
        _refuse(f"manifest={path}", contradictions(content))
        manifest = cls(content, path.parent, remote)
        if remote and cache_bytes < (least := ROOM * max((shard.size for shard in content.shards), default=0)):
            raise InputError(
                f"cache_bytes={cache_bytes} is below {least}, the size of {ROOM} of the largest shards: raise it"
            )
        if check_files:
            _refuse(f"manifest={path}", [*manifest.tokenizer_problems(), *manifest.missing_or_truncated()])
        return manifest

    def save(self) -> Path:
        """Writes manifest.json atomically; returns its path."""
        path = self.directory / "manifest.json"
        replace_file(path, json.dumps(CONTENT.dump_python(self.content, mode="json"), indent=1).encode() + b"\n")
        return path

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.content.shards

    @property
    def sources(self) -> dict[str, SourceInfo]:
        return self.content.sources

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.content.tokenizer

    @property
    def dtype(self) -> np.dtype:
        """The dtype of stored tokens: little-endian uint16 or uint32."""
        return np.dtype(self.content.dtype).newbyteorder("<")

    @property
    def totals(self) -> Totals:
        return self.content.totals

    @functools.cached_property
    def content_hash(self) -> str:
        """sha256 over the manifest's content, including shard hashes, but not the folder's path."""
        canonical = json.dumps(CONTENT.dump_python(self.content, mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def place(self) -> str:
        """The folder or URL that the manifest was loaded from, for messages: without secrets."""
        return str(self.remote or self.directory)

    def local(self, name: str, *, size: int | None = None, sha256: str | None = None) -> Path:
        """The local path of a file of this manifest, downloaded if necessary. Raises OSError."""
        return self.remote.fetch(name, size=size, sha256=sha256) if self.remote else self.directory / name

    def open(
        self, name: str, *, size: int | None = None, sha256: str | None = None, most: int = MOST_UNSIZED
    ) -> FileIO:
        """Opens a file of this manifest; of a remote file of unknown `size`, at most `most` bytes are downloaded.
        Raises OSError."""
        if self.remote:
            return self.remote.open(name, size=size, sha256=sha256, most=most)
        file = FileIO(self.directory / name)
        if size is not None and (found := os.fstat(file.fileno()).st_size) != size:
            file.close()
            raise OSError(f"{found} bytes on disk, {size} in the manifest")
        return file

    def read(self, name: str, *, sha256: str | None = None, most: int = MOST_UNSIZED, fresh: bool = False) -> bytes:
        """The content of a file of this manifest; a remote file is downloaded again if `fresh` or if the cached copy
        has another hash. Raises OSError."""
        if self.remote and fresh:
            self.remote.fetch(name, sha256=sha256, most=most, fresh=True)
        with self.open(name, sha256=sha256, most=most) as file:
            data = file.readall()
        if self.remote and sha256 and not fresh and hashlib.sha256(data).hexdigest() != sha256:
            return self.read(name, sha256=sha256, most=most, fresh=True)
        return data

    def names(self) -> set[str]:
        """Names of the files beside the manifest; empty for a remote folder that cannot be listed."""
        return set(self.remote.names() if self.remote else os.listdir(self.directory))

    def score_problems(self, setting: str) -> list[str]:
        """One line, which begins with `setting`, when the folder of a local manifest takes no scores. Whether a remote
        one does, `publish` finds out."""
        if self.remote is not None or os.access(self.directory, os.W_OK | os.X_OK):
            return []
        return [f"{setting}: scores are written beside it, and {self.directory} is read-only"]

    def publish(self, name: str) -> None:
        """Uploads a file from `directory` to a remote manifest's folder. Raises InputError."""
        if not self.remote:
            return
        try:
            self.remote.put(name)
        except Exception as error:  # each fsspec file system has its own errors
            raise InputError(f"{self.place}/{name}: cannot be written: {error or type(error).__name__}") from None

    def tokenizer_problems(self) -> list[str]:
        """One line when the tokenizer beside the shards is absent or has another hash."""
        name = self.tokenizer.file
        try:
            found = sha256_of(self.local(name))
            if self.remote and found != self.tokenizer.sha256:  # the corpus was republished at its URL
                found = sha256_of(self.remote.fetch(name, fresh=True))
        except OSError as error:
            return [f"tokenizer {name}: missing or unreadable: {error.strerror}"]
        if found == self.tokenizer.sha256:
            return []
        return [f"tokenizer {name}: altered: its sha256 is {found}, that of the shards {self.tokenizer.sha256}"]

    def missing_or_truncated(self) -> list[str]:
        """One line per shard that is missing or truncated, as in `file_problem`; for remote shards, by one listing."""
        if self.remote:
            return self._remote_problems()
        return [problem for shard in self.shards if (problem := self.file_problem(shard))]

    def _remote_problems(self) -> list[str]:
        wanted = [name for shard in self.shards for name in (shard.name, shard.index)]
        try:
            sizes = self.remote.sizes(wanted)
        except OSError as error:
            return [str(error)]
        problems = []
        for shard in self.shards:
            if shard.name not in sizes or shard.index not in sizes:
                problems.append(f"shard {shard.name}: it or its index is missing in {self.remote}")
            elif sizes[shard.name] not in (shard.size, None):
                kind = "truncated" if sizes[shard.name] < shard.size else "altered"
                problems.append(f"shard {shard.name}: {kind}: {sizes[shard.name]} bytes, {shard.size} in the manifest")
        return problems

    def file_problem(self, shard: Shard) -> str | None:
        """One line when the shard or its index is absent, or the shard has not its recorded size. Reads no content."""
        try:
            size = os.stat(self.directory / shard.name).st_size
            os.stat(self.directory / shard.index)
        except OSError as error:
            return f"shard {shard.name}: missing or unreadable: {error.filename}: {error.strerror}"
        if size == shard.size:
            return None
        kind = "truncated" if size < shard.size else "altered"
        return f"shard {shard.name}: {kind}: {size} bytes on disk, {shard.size} in the manifest"


def _open_remote(path: str, cache: str | Path | None, cache_bytes: int) -> tuple[Remote | None, str]:
    """The remote folder of a manifest's URL and the manifest's name in it, downloaded again; None for a local path."""
    if not is_remote(path):
        return None, ""
    address, mark, query = path.partition("?") if path.startswith(("http://", "https://")) else (path, "", "")
    url, _, name = address.rpartition("/")
    try:
        remote = Remote(url, Cache(Path(cache) if cache else default_cache(), cache_bytes), mark + query)
        remote.fetch(name, fresh=True)
    except (OSError, CacheFull) as error:
        raise InputError(f"manifest={path}: {error}") from None
    return remote, name


def _format(written: bytes) -> object:
    """The value of "format" in the bytes of a JSON object, "" where it has none; None for what is no JSON object."""
    try:
        values = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return values.get("format", "") if isinstance(values, dict) else None


def _may_be_ours(path: Path) -> bool:
    """Whether a file is a manifest of shards, or damaged JSON."""
    try:
        return path.is_file() and _format(path.read_bytes()) in (FORMAT, None)
    except OSError:
        return False


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        raise InputError(*(f"{where}: {problem}" for problem in problems))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
