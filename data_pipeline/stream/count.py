"""Counts a filter's kept documents per shard: `python -m data_pipeline.stream.count MANIFEST FILTER [--workers N]`.

MANIFEST is a path or an fsspec URL. FILTER is a YAML file or inline JSON (see conf/score_filter.yaml), or
module:object of a user-defined filter. Only indexes and scores are read. Progress is saved per shard, so that a killed
run continues. The result is cached beside the manifest. Exit code 2 with a line per problem for bad input.
"""

import contextlib
import fcntl
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pydantic import TypeAdapter, ValidationError

from data_pipeline.cli import command, parser
from data_pipeline.errors import InputError
from data_pipeline.files import open_lock, replace_file
from data_pipeline.pool import process_pool
from data_pipeline.shards.content import Shard
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import shard_index
from data_pipeline.stream.pipeline import load_filter
from data_pipeline.stream.score_filter import DocumentFilter, KeptCounts, Row, ScoreFilter, count_row, counts_file

CHUNK = 16  # shards per task of a worker
NOTE = TypeAdapter(tuple[str, Row])  # a line of the progress file


def count(manifest: Manifest, filter: DocumentFilter, *, workers: int = 1, publish: bool = True) -> KeptCounts:
    """Counts the shards that are not counted yet, caches the result beside the manifest, and returns it. For a remote
    manifest, the result is also in the local cache of its shards; only there without `publish`. Raises InputError
    naming unusable scores or indexes, or an unwritable folder."""
    name = counts_file(manifest, filter)
    path = manifest.directory / name
    if not path.exists():
        _count_alone(manifest, filter, workers, path)
    if publish:
        try:
            manifest.publish(name)
        except InputError as error:
            raise InputError(
                f"{error}; the counts are in {path}: with --local that is enough, and every machine that trains needs "
                "them there"
            ) from None
    return KeptCounts.load(manifest, filter)


def _count_alone(manifest: Manifest, filter: DocumentFilter, workers: int, path: Path) -> None:
    """Writes `path`, or waits until another process has written it: its lock is the file of its progress."""
    progress = path.with_suffix(".progress")
    try:
        notes = open_lock(progress)
    except OSError as error:
        raise InputError(f"{progress}: {error.strerror}") from None
    with notes:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(notes, fcntl.LOCK_EX)
        if path.exists():
            return
        rows = _count_rest(manifest, filter, workers, notes)
        record = {"manifest": manifest.content_hash, "filter": filter.filter_hash, "shards": rows}
        replace_file(path, json.dumps(record).encode() + b"\n")
        progress.unlink(missing_ok=True)


def _count_rest(manifest: Manifest, filter: DocumentFilter, workers: int, notes: BinaryIO) -> list[Row]:
    """Counts of every shard; shards missing from file `notes` are counted and appended to it."""
    done = _noted(notes)
    todo = [shard for shard in manifest.shards if shard.name not in done]
    with process_pool(workers) as pool:
        work = functools.partial(count_shard, manifest, filter)
        rows: Iterable[Row] = map(work, todo) if workers == 1 else pool.map(work, todo, chunksize=CHUNK)
        for shard, row in zip(todo, rows, strict=True):
            done[shard.name] = row
            notes.write(json.dumps([shard.name, row]).encode() + b"\n")
            notes.flush()
    return [done[shard.name] for shard in manifest.shards]


def count_shard(manifest: Manifest, filter: DocumentFilter, shard: Shard) -> Row:
    """Counts of one shard. Scores are downloaded again: cached ones may be of an earlier scoring."""
    try:
        index = shard_index(manifest, shard)
        return count_row(index, *filter.kept(functools.partial(manifest.read, fresh=True), shard, index))
    except OSError as error:
        raise InputError(f"shard {shard.name}: index {shard.index}: {error}") from None


def _noted(notes: BinaryIO) -> dict[str, Row]:
    """{shard: counts} from `notes`, up to a truncated line, as a killed run leaves it, or a damaged one."""
    found, end = {}, 0
    for line in notes.read().splitlines(keepends=True):
        try:
            name, row = NOTE.validate_json(line if line.endswith(b"\n") else b"")
        except ValidationError:
            break
        found[name], end = row, end + len(line)
    notes.seek(end)
    notes.truncate()
    return found


@command
def main(arguments: list[str]) -> None:
    options = parser("data_pipeline.stream.count", __doc__)
    options.add_argument("manifest", help="a manifest.json: a path, or a URL of fsspec")
    options.add_argument("filter", help="a YAML file, inline JSON, or module:object")
    options.add_argument(
        "--local", action="store_true", help="keep the counts of a remote manifest in this machine's cache alone"
    )
    options.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    given = options.parse_args(arguments)
    if given.workers < 1:
        raise InputError(f"--workers={given.workers} must be at least 1")
    filter = load_filter(given.filter)
    manifest = Manifest.load(given.manifest, check_files=False)
    # Only a warning: a split or a part of the corpus may lack a source of the filter's bands.
    if isinstance(filter, ScoreFilter) and (unused := filter.unused_bands(manifest.sources)):
        print(
            f"warning: bands of {', '.join(unused)}: no such source, there are {', '.join(manifest.sources)}",
            file=sys.stderr,
        )
    counts = count(manifest, filter, workers=given.workers, publish=not given.local)
    totals = manifest.totals
    path = manifest.directory / counts_file(manifest, filter)
    print(
        f"{path}: keeps {counts.documents.sum()} of {totals.documents} documents, "
        f"{counts.tokens.sum()} of {totals.tokens} tokens"
    )


if __name__ == "__main__":
    sys.exit(main())
