"""Counts what a filter keeps of each shard: `python -m data_pipeline.stream.count MANIFEST FILTER [--workers N]`.

FILTER is a YAML file or inline JSON (see conf/selfclean). Only indexes and scores are read. Counted shards are noted as
they are done, so that a run that was killed goes on where it was. Exit code 2 and a line a problem for bad input.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.shards.index import load_index
from data_pipeline.shards.manifest import Manifest, Shard, replace_file
from data_pipeline.stream.score_filter import KeptCounts, Row, ScoreFilter, count_row, counts_path, kept_documents

CHUNK = 16  # shards that a worker takes at once


def count(manifest: Manifest, filter: ScoreFilter, *, workers: int = 1) -> KeptCounts:
    """Counts the shards that are not counted yet, caches the result beside the manifest, and returns it. Raises
    InputError naming the scores or index that cannot be used."""
    path = counts_path(manifest, filter)
    if path.exists():
        return KeptCounts.load(manifest, filter)
    progress = path.with_suffix(".progress")
    done = _noted(progress)
    todo = [shard for shard in manifest.shards if shard.name not in done]
    with progress.open("ab") as notes, ProcessPoolExecutor(workers) as pool:
        work = functools.partial(count_shard, manifest.directory, manifest.dtype.itemsize, filter)
        rows: Iterable[Row] = map(work, todo) if workers == 1 else pool.map(work, todo, chunksize=CHUNK)
        for shard, row in zip(todo, rows, strict=True):
            done[shard.name] = row
            notes.write(json.dumps([shard.name, row]).encode() + b"\n")
            notes.flush()
    record = {
        "manifest": manifest.content_hash,
        "filter": filter.filter_hash,
        "shards": [done[shard.name] for shard in manifest.shards],
    }
    replace_file(path, json.dumps(record).encode() + b"\n")
    os.unlink(progress)
    return KeptCounts.load(manifest, filter)


def count_shard(directory: Path, itemsize: int, filter: ScoreFilter, shard: Shard) -> Row:
    """What `filter` keeps of one shard."""
    index = load_index(
        directory / shard.index, documents=shard.documents, tokens=shard.tokens, size=shard.size, itemsize=itemsize
    )
    return count_row(shard, index, *kept_documents(lambda name: (directory / name).read_bytes(), shard, index, filter))


def _noted(progress: Path) -> dict[str, Row]:
    """The shards that a killed run has counted; its last line may be torn."""
    if not progress.exists():
        return {}
    whole, _, torn = progress.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(progress, len(whole) + 1 if whole else 0)
    return {name: tuple(row) for name, row in map(json.loads, whole.splitlines())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.stream.count",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", help="a manifest.json")
    parser.add_argument("filter", help="a YAML file, or inline JSON")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise InputError(f"--workers={options.workers} must be at least 1")
        filter = ScoreFilter.load(options.filter)
        manifest = Manifest.load(options.manifest, check_files=False)
        counts = count(manifest, filter, workers=options.workers)
    except InputError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    totals = manifest.totals
    print(
        f"{counts_path(manifest, filter)}: keeps {counts.documents.sum()} of {totals.documents} documents, "
        f"{counts.tokens.sum()} of {totals.tokens} tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
