"""Steps that train the tokenizer and write shards and manifests."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from pydantic import TypeAdapter

from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import TokenizerSettings
from data_pipeline.document import in_heldout, text_bytes
from data_pipeline.encoder import Encoder
from data_pipeline.errors import InputError
from data_pipeline.files import replace_file
from data_pipeline.round_trip import RoundTrip
from data_pipeline.sample import SampleText
from data_pipeline.shards.manifest import Manifest, Shard, SourceInfo, token_dtype
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.sources import Source, category_of
from data_pipeline.steps.documents import Stored

SPLITS = ("train", "heldout")
SHARDS = TypeAdapter(dict[str, list[Shard]])
METADATA = "tokenizer.metadata.json"


class MakeTokenizer(PipelineStep):
    """In one task: output/tokenizer.json, trained on the sample, or copied from the settings' `file`."""

    type = "🔤 - TOKENIZER"
    name = "make tokenizer"

    def __init__(self, settings: TokenizerSettings, sample: Stored, path: Path):
        super().__init__()
        self.settings = settings
        self.sample = sample
        self.path = path

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if self.settings.file:
            made = Path(self.settings.file).read_bytes()
        else:
            made = tokenizers.train(self._texts, self.settings.vocab_size).to_str(pretty=True).encode()
        replace_file(self.path, made)
        return data

    def _texts(self) -> Iterator[str]:
        for rank in self.sample.tasks():
            yield from (document.text for document in self.sample.read(rank))


class WriteShards(PipelineStep):
    """Per task: tokenises documents as [bos] text [eos] into shards of both splits, listed in records/RANK.json.

    A text that does not decode to itself is an error: bits per byte would be measured on another text.
    """

    type = "📦 - SHARDS"
    name = "write shards"

    def __init__(
        self,
        settings: TokenizerSettings,
        heldout_fraction: float,
        sources: dict[str, Source],
        shard_tokens: int,
        output: Path,
        records: Path,
    ):
        super().__init__()
        self.settings = settings
        self.heldout_fraction = heldout_fraction
        self.categories = {name: category_of(name, source) for name, source in sources.items()}
        self.shard_tokens = shard_tokens
        self.output = output
        self.records = records

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        path = self.output / "tokenizer.json"
        info, tokenizer = describe(path, self.settings), tokenizers.load(path)
        round_trip, encoder = RoundTrip(f"tokenizer {path}", tokenizer, self.categories), Encoder(tokenizer)
        dtype = np.dtype(token_dtype(info.vocab_size))
        train, heldout = (
            ShardWriter(self.output / split, f"{split}-{rank:05d}", dtype=dtype, shard_tokens=self.shard_tokens)
            for split in SPLITS
        )
        with train, heldout:
            for document in data:
                ids = encoder.encode(document.text)
                round_trip.check(document, ids)
                side = heldout if in_heldout(document.text, self.heldout_fraction) else train
                side.write(
                    np.concatenate(([info.bos], ids, [info.eos])),
                    id=document.id,
                    source=document.metadata["source"],
                    text_bytes=text_bytes(document),
                    language=document.metadata.get("language", ""),
                    key=document.metadata.get("key", ""),
                )
        self.records.mkdir(parents=True, exist_ok=True)
        record = {"train": train.shards, "heldout": heldout.shards}
        replace_file(self.records / f"{rank:05d}.proof", json.dumps(round_trip.proven).encode())
        replace_file(self.records / f"{rank:05d}.json", SHARDS.dump_json(record))
        return None


class WriteManifests(PipelineStep):
    """In one task, after all shards: a manifest and a copy of the tokenizer beside each split's shards, and
    output/tokenizer.metadata.json: the tokenizer's training sample, and the round-trip checks."""

    type = "📦 - SHARDS"
    name = "write manifests"

    def __init__(
        self,
        settings: TokenizerSettings,
        heldout_fraction: float,
        sources: dict[str, Source],
        output: Path,
        records: Path,
        sample: SampleText | None,
    ):
        super().__init__()
        self.settings = settings
        self.heldout_fraction = heldout_fraction
        self.sources = {name: SourceInfo(source.category, source.epochs) for name, source in sources.items()}
        self.output = output
        self.records = records
        self.sample = sample

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        records = [SHARDS.validate_json(path.read_bytes()) for path in sorted(self.records.glob("*.json"))]
        source = self.output / "tokenizer.json"
        info = describe(source, self.settings)
        metadata = {
            "vocab_size": info.vocab_size,
            "sha256": info.sha256,
            "trained": not self.settings.file,
            "sample": self.sample.summary() if self.sample else {},
            "round_trip": self._proven(),
        }
        replace_file(self.output / METADATA, json.dumps(metadata, indent=1, ensure_ascii=False).encode() + b"\n")
        for split in splits(self.heldout_fraction):
            shards = [shard for record in records for shard in record[split]]
            if not shards:
                raise InputError(f"{split} split: no document is left for it; see the drops in {self.output / 'drops'}")
            replace_file(self.output / split / source.name, source.read_bytes())
            Manifest.create(self.output / split, info, shards, self.sources).save()
        return data

    def _proven(self) -> dict[str, dict[str, int]]:
        proven: dict[str, dict[str, int]] = {}
        for path in sorted(self.records.glob("*.proof")):
            for category, (documents, size) in json.loads(path.read_bytes()).items():
                entry = proven.setdefault(category, {"documents": 0, "bytes": 0})
                entry["documents"] += documents
                entry["bytes"] += size
        return dict(sorted(proven.items()))


def splits(heldout_fraction: float) -> tuple[str, ...]:
    """Names of the splits that a run writes."""
    return SPLITS if heldout_fraction > 0 else SPLITS[:1]


def describe(path: str | Path, settings: TokenizerSettings):
    """The manifest's entry for a tokenizer, with the special entries named in the settings."""
    return tokenizers.describe(path, bos=settings.bos, eos=settings.eos, pad=settings.pad)
