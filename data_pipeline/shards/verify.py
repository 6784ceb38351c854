"""Reads every shard of a manifest to the last byte: `python -m data_pipeline.shards.verify MANIFEST`.

Exit code 0: all shards agree with the manifest. 1: they do not, one line per problem. 2: the manifest or an argument is
invalid. 130: interrupted.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_pipeline.cli import command, parser
from data_pipeline.errors import InputError
from data_pipeline.files import sha256_of
from data_pipeline.pool import process_pool
from data_pipeline.shards.content import Shard
from data_pipeline.shards.index import OFFSET, TEXT_BYTES, TOKENS, build_index, index_bytes, parse_index
from data_pipeline.shards.manifest import Manifest


@dataclass(frozen=True)
class Checked:
    """Result for a shard: its problems, and 64-bit hashes of each document's id and tokens, uint64 [documents]."""

    problems: list[str]
    ids: np.ndarray
    texts: np.ndarray


NOTHING = np.empty(0, np.uint64)


def verify(manifest: Manifest, *, workers: int = 1, content: bool = False, progress: bool = False) -> list[str]:
    """One line for each shard that is missing, truncated, altered, duplicated or not in the manifest, and each document
    id that occurs twice; with `content`, also for each document with the tokens of another one. Empty without problems.
    `workers`: processes; memory is 16 bytes per document."""
    problems = manifest.tokenizer_problems()
    check = functools.partial(_check_shard, manifest)
    checked = []
    for found in _tracked(_map(check, manifest.shards, workers), len(manifest.shards), progress):
        problems += found.problems
        checked.append(found)
    problems += _doubles(manifest, [found.ids for found in checked], "id")
    if content:
        problems += _doubles(manifest, [found.texts for found in checked], "text")
    listed = {shard.name for shard in manifest.shards}
    for name in sorted(manifest.names()):
        if name.endswith(".tar") and name not in listed:
            problems.append(f"shard {name}: lies beside the manifest, which does not list it")
    return problems


def _map(check: Callable[[Shard], Checked], shards: tuple[Shard, ...], workers: int) -> Iterator[Checked]:
    """Results of `check` for all shards, in the order of the shards."""
    if workers == 1 or len(shards) < 2:
        yield from map(check, shards)
        return
    with process_pool(min(workers, len(shards)), get_context("spawn")) as pool:
        try:
            yield from pool.map(check, shards)
        except BrokenProcessPool:
            raise InputError(
                f"workers={workers}: a worker process was killed, perhaps for want of memory: take fewer workers"
            ) from None


def _tracked(checked: Iterable[Checked], total: int, progress: bool) -> Iterator[Checked]:
    if not progress:
        return iter(checked)
    from rich.console import Console
    from rich.progress import track

    return iter(track(checked, total=total, description="verify", console=Console(stderr=True)))


def _check_shard(manifest: Manifest, shard: Shard) -> Checked:
    path, itemsize = manifest.directory / shard.name, manifest.dtype.itemsize
    try:
        if manifest.remote:
            # The server's current file: without sha256, no cached file is used.
            manifest.remote.fetch(shard.name, fresh=True, most=shard.size)
            manifest.remote.fetch(shard.index, fresh=True, most=index_bytes(shard.documents))
        if problem := manifest.file_problem(shard):
            return _bad(problem)
        if sha256_of(path) != shard.sha256:
            return _bad(f"shard {shard.name}: altered: its sha256 is not the manifest's")
        built, metadata = build_index(path, itemsize)
        packed = (manifest.directory / shard.index).read_bytes()
        stored = parse_index(packed, shard, itemsize)
        if hashlib.sha256(packed).hexdigest() != shard.index_sha256 or not np.array_equal(built, stored):
            return _bad(f"shard {shard.name}: its index {shard.index} is altered")
        data = path.read_bytes()
    except InputError as error:
        return _bad(*error.problems)
    except OSError as error:
        return _bad(f"shard {shard.name}: missing or unreadable: {error}")
    if built[:, TEXT_BYTES].sum() != shard.text_bytes or built[:, TOKENS].min() != shard.shortest_document:
        return _bad(f"shard {shard.name}: text_bytes or shortest_document in the manifest are not the documents'")
    if strangers := {record["source"] for record in metadata} - {shard.source}:
        return _bad(f"shard {shard.name}: holds source {min(strangers)!r}, the manifest says {shard.source!r}")
    problems, texts = [], np.empty(len(built), np.uint64)
    for row, (offset, count) in enumerate(built[:, [OFFSET, TOKENS]].tolist()):
        tokens = np.frombuffer(data, manifest.dtype, count, offset)
        problems += _token_problems(manifest, shard, row, tokens)
        texts[row] = _hash(tokens.tobytes())
    ids = np.array([_hash(str(record.get("id")).encode()) for record in metadata], np.uint64)
    return Checked(problems, ids, texts)


def _bad(*problems: str) -> Checked:
    return Checked(list(problems), NOTHING, NOTHING)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _token_problems(manifest: Manifest, shard: Shard, row: int, tokens: np.ndarray) -> Iterator[str]:
    info = manifest.tokenizer
    if tokens.max() >= info.vocab_size:
        yield f"shard {shard.name}: document {row}: token {tokens.max()} is not below vocab_size={info.vocab_size}"
    if tokens[0] != info.bos or tokens[-1] != info.eos:
        yield f"shard {shard.name}: document {row}: does not begin with bos={info.bos} and end with eos={info.eos}"


def _doubles(manifest: Manifest, hashes: list[np.ndarray], what: str) -> Iterator[str]:
    """A line for each document with the same hash as an earlier one."""
    together = np.concatenate(hashes) if hashes else NOTHING
    order = np.argsort(together, kind="stable")
    same = np.flatnonzero(together[order][1:] == together[order][:-1]) + 1
    if not len(same):
        return
    starts = np.cumsum([0, *map(len, hashes)])
    firsts = order[np.searchsorted(together[order], together[order][same], side="left")]
    for later, first in sorted(zip(order[same].tolist(), firsts.tolist(), strict=True)):
        (shard, identity), (other, earlier) = (_place(manifest, starts, at) for at in (later, first))
        where = f"already in {other.name}" if other != shard else "twice in it"
        if what == "id":
            yield f"shard {shard.name}: document {identity!r} is {where}"
        else:
            yield f"shard {shard.name}: document {identity!r} has the text of {earlier!r} in {other.name}"


def _place(manifest: Manifest, starts: np.ndarray, at: int) -> tuple[Shard, str]:
    number = int(np.searchsorted(starts, at, side="right")) - 1
    shard = manifest.shards[number]
    return shard, _identities(manifest.local(shard.name), manifest.dtype.itemsize)[at - int(starts[number])]


@functools.lru_cache(maxsize=8)
def _identities(path: Path, itemsize: int) -> list[str]:
    return [str(record.get("id")) for record in build_index(path, itemsize)[1]]


@command
def main(arguments: list[str]) -> int:
    options = parser("data_pipeline.shards.verify", __doc__)
    options.add_argument("manifest", help="a manifest.json: a path, or a URL of fsspec")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a CPU)")
    options.add_argument("--content", action="store_true", help="also name documents that have the same text")
    given = options.parse_args(arguments)
    if given.workers < 1:
        raise InputError(f"--workers={given.workers} must be at least 1")
    manifest = Manifest.load(given.manifest, check_files=False)
    problems = verify(manifest, workers=given.workers, content=given.content, progress=sys.stderr.isatty())
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    totals = manifest.totals
    print(f"{totals.shards} shards, {totals.documents} documents, {totals.tokens} tokens: all as the manifest says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
