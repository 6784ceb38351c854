"""Divides a corpus into parts, each a tar file of xz-compressed shards with a manifest, and joins parts again.

part-1.tar
  train/part-1.json           manifest of this part's shards
  train/NAME.tar.xz ...       its shards and their indexes
  train/tokenizer.json
  heldout/...                 all held-out shards, with manifest.json and tokenizer.json, in every part
"""

import dataclasses
import io
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import InputError
from data_pipeline.files import replace_file, replacing
from data_pipeline.pool import process_pool
from data_pipeline.shards.content import CONTENT, Shard
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.verify import verify

SPLITS = ("train", "heldout")
XZ = ".xz"


def divide(corpus: Path, output: Path, part_bytes: int, workers: int) -> list[dict[str, int]]:
    """Writes the parts of the corpus below `corpus` to `output`, of at most about `part_bytes` bytes each; returns the
    size, shards, documents and tokens of each. Every part has a like share of every source."""
    train, heldout = (Manifest.load(corpus / split / "manifest.json") for split in SPLITS)
    output.mkdir(parents=True, exist_ok=True)
    packed = output / "packed"
    for split in SPLITS:
        (packed / split).mkdir(parents=True, exist_ok=True)
    files = [(manifest.directory / name, packed / split / f"{name}{XZ}")
             for manifest, split in ((train, "train"), (heldout, "heldout"))
             for shard in manifest.shards for name in (shard.name, shard.index)]  # fmt: skip
    with process_pool(workers) as pool:
        list(pool.map(_compress, *zip(*files, strict=True)))
    common = sum(file.stat().st_size for file in (packed / "heldout").iterdir())
    sizes = {
        shard.name: sum(_packed(packed, name).stat().st_size for name in (shard.name, shard.index))
        for shard in train.shards
    }
    groups = deal(list(train.shards), sizes, part_bytes - common)
    written = []
    for number, shards in enumerate(groups, 1):
        path = output / f"part-{number}.tar"
        part = Manifest.create(train.directory, train.tokenizer, shards, train.sources)
        with replacing(path) as file, tarfile.open(fileobj=file, mode="w") as archive:
            _add(archive, f"train/part-{number}.json", CONTENT.dump_json(part.content, indent=1))
            _add(archive, f"train/{train.tokenizer.file}", train.read(train.tokenizer.file))
            for name in (name for shard in shards for name in (shard.name, shard.index)):
                _add(archive, f"train/{name}{XZ}", _packed(packed, name).read_bytes())
            for name in ("manifest.json", heldout.tokenizer.file):
                _add(archive, f"heldout/{name}", heldout.read(name))
            for file_ in sorted((packed / "heldout").iterdir()):
                _add(archive, f"heldout/{file_.name}", file_.read_bytes())
        written.append({"bytes": path.stat().st_size, **dataclasses.asdict(part.totals)})
    shutil.rmtree(packed)
    return written


def deal(shards: list[Shard], sizes: dict[str, int], most: int) -> list[list[Shard]]:
    """Divides shards into the fewest groups of about equal size, at most `most` bytes if they fit so: source by source,
    the largest shard first, each to the smallest group."""
    count = -(-sum(sizes.values()) // most)
    groups: list[list[Shard]] = [[] for _ in range(count)]
    filled = [0] * count
    for shard in sorted(shards, key=lambda shard: (shard.source, -sizes[shard.name], shard.name)):
        least = filled.index(min(filled))
        groups[least].append(shard)
        filled[least] += sizes[shard.name]
    return [sorted(group, key=lambda shard: shard.name) for group in groups]


def join(parts: list[Path], output: Path) -> dict[str, Manifest]:
    """Unpacks parts into `output`/train and `output`/heldout, with a manifest of all of them; returns the manifests.
    Parts that were joined there before stay. Raises InputError for parts of different corpora, and for damaged ones."""
    for path in parts:
        for name, data in _read(path):
            target = output / name.removesuffix(XZ)
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, lzma.decompress(data) if name.endswith(XZ) else data)
    found = [Manifest.load(path) for path in sorted((output / "train").glob("part-*.json"))]
    tokenizers = {manifest.tokenizer for manifest in found}
    if len(tokenizers) > 1:
        raise InputError(
            f"{output}: parts of {len(tokenizers)} corpora, with different tokenizers: join each corpus alone"
        )
    shards = sorted((shard for manifest in found for shard in manifest.shards), key=lambda shard: shard.name)
    sources = {name: info for manifest in found for name, info in manifest.sources.items()}
    Manifest.create(output / "train", found[0].tokenizer, shards, sources).save()
    manifests = {split: Manifest.load(output / split / "manifest.json") for split in SPLITS}
    if problems := [problem for manifest in manifests.values() for problem in verify(manifest)]:
        raise InputError(*problems)
    return manifests


def _compress(source: Path, target: Path) -> None:
    target.write_bytes(lzma.compress(source.read_bytes(), preset=6))


def _packed(packed: Path, name: str) -> Path:
    return packed / "train" / f"{name}{XZ}"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def _read(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for entry in archive:
            place = Path(entry.name)
            if not entry.isreg() or len(place.parts) != 2 or place.parts[0] not in SPLITS:
                raise InputError(f"{path}: {entry.name} is no file of a part that data_pipeline.corpus wrote")
            yield entry.name, archive.extractfile(entry).read()
