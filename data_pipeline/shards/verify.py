"""Reads every shard of a manifest to the last byte: `python -m data_pipeline.shards.verify MANIFEST`.

Exit code 0: all is as the manifest says. 1: it is not, one line a finding. 2: the manifest itself cannot be read.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shards.index import OFFSET, TEXT_BYTES, TOKENS, build_index, load_index
from data_pipeline.shards.manifest import Manifest, Shard, sha256_of


def verify(manifest: Manifest, *, progress: bool = False) -> list[str]:
    """One line for each shard that is missing, truncated, altered or duplicated, each that the manifest does not list,
    and each document id that occurs twice; an empty list when all is well."""
    problems = manifest.tokenizer_problems()
    seen: dict[str, str] = {}
    for shard in _tracked(manifest.shards, progress):
        problems += _shard_problems(manifest, shard, seen)
    listed = {shard.name for shard in manifest.shards}
    beside = (
        manifest.remote.names() if manifest.remote else sorted(path.name for path in manifest.directory.glob("*.tar"))
    )
    for name in beside:
        if name.endswith(".tar") and name not in listed:
            problems.append(f"shard {name}: lies beside the manifest, which does not list it")
    return problems


def _tracked(shards: tuple[Shard, ...], progress: bool) -> Iterator[Shard]:
    if not progress:
        return iter(shards)
    from rich.console import Console
    from rich.progress import track

    return iter(track(shards, description="verify", console=Console(stderr=True)))


def _shard_problems(manifest: Manifest, shard: Shard, seen: dict[str, str]) -> list[str]:
    """`seen` maps a document id to the shard that held it first."""
    path, itemsize = manifest.directory / shard.name, manifest.dtype.itemsize
    if manifest.remote:
        try:
            for name in (shard.name, shard.index):
                manifest.remote.fetch(name, fresh=True)  # what is there now, and not what a cache still has
        except OSError as error:
            return [f"shard {shard.name}: missing or unreadable: {error}"]
    if problem := manifest.file_problem(shard):
        return [problem]
    if sha256_of(path) != shard.sha256:
        return [f"shard {shard.name}: altered: its sha256 is not the manifest's"]
    try:
        built, metadata = build_index(path, itemsize)
        stored = load_index(
            manifest.directory / shard.index,
            documents=shard.documents,
            tokens=shard.tokens,
            size=shard.size,
            itemsize=itemsize,
        )
    except InputError as error:
        return list(error.problems)
    if sha256_of(manifest.directory / shard.index) != shard.index_sha256 or not np.array_equal(built, stored):
        return [f"shard {shard.name}: its index {shard.index} is altered"]
    if built[:, TEXT_BYTES].sum() != shard.text_bytes or built[:, TOKENS].min() != shard.shortest_document:
        return [f"shard {shard.name}: text_bytes or shortest_document in the manifest are not the documents'"]
    if strangers := {record["source"] for record in metadata} - {shard.source}:
        return [f"shard {shard.name}: holds source {min(strangers)!r}, the manifest says {shard.source!r}"]
    return [*_token_problems(manifest, shard, built), *_duplicate_problems(shard, metadata, seen)]


def _token_problems(manifest: Manifest, shard: Shard, index: np.ndarray) -> Iterator[str]:
    info, data = manifest.tokenizer, (manifest.directory / shard.name).read_bytes()
    for row, (offset, count) in enumerate(index[:, [OFFSET, TOKENS]].tolist()):
        tokens = np.frombuffer(data, manifest.dtype, count, offset)
        if tokens.max() >= info.vocab_size:
            yield f"shard {shard.name}: document {row}: token {tokens.max()} is not below vocab_size={info.vocab_size}"
        if tokens[0] != info.bos or tokens[-1] != info.eos:
            yield f"shard {shard.name}: document {row}: does not begin with bos={info.bos} and end with eos={info.eos}"


def _duplicate_problems(shard: Shard, metadata: list[dict], seen: dict[str, str]) -> Iterator[str]:
    for record in metadata:
        first = seen.setdefault(identity := str(record.get("id")), shard.name)
        if first != shard.name:
            yield f"shard {shard.name}: document {identity!r} is already in {first}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.shards.verify", description=__doc__.splitlines()[0])
    parser.add_argument("manifest", help="a manifest.json: a path, or a URL of fsspec")
    try:
        manifest = Manifest.load(parser.parse_args(arguments).manifest, check_files=False)
    except InputError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    if problems := verify(manifest, progress=sys.stderr.isatty()):
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    totals = manifest.totals
    print(f"{totals.shards} shards, {totals.documents} documents, {totals.tokens} tokens: all as the manifest says")
    return 0


if __name__ == "__main__":
    sys.exit(main())
