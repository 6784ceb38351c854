"""From clean documents to a tokenizer, and from both to shards and manifests."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched
from pydantic import TypeAdapter

from data_pipeline import tokenizer as tokenizers
from data_pipeline.config import TokenizerSettings
from data_pipeline.document import in_heldout, text_bytes, text_hash
from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Manifest, Shard, SourceInfo, replace_file, token_dtype
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.sources import Source

SPLITS = ("train", "heldout")
SHARDS = TypeAdapter(dict[str, list[Shard]])
BATCH = 64  # documents encoded in one call
PROOF = 16  # one document in so many is decoded again and compared


class MakeTokenizer(PipelineStep):
    """In one task: output/tokenizer.json, trained on the training split alone, or copied from where it exists."""

    type = "🔤 - TOKENIZER"
    name = "make tokenizer"

    def __init__(self, settings: TokenizerSettings, heldout_fraction: float, clean: Path, path: Path):
        super().__init__()
        self.settings = settings
        self.heldout_fraction = heldout_fraction
        self.clean = clean
        self.path = path

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        temporary = self.path.with_name("tokenizer.json.tmp")
        if self.settings.file:
            shutil.copyfile(self.settings.file, temporary)
        else:
            size = sum(path.stat().st_size for path in self.clean.glob("*.jsonl"))
            share = min(1.0, self.settings.sample_bytes / max(size, 1))
            tokenizers.train(lambda: self._sample(share), self.settings.vocab_size).save(str(temporary))
        temporary.replace(self.path)
        return data

    def _sample(self, share: float) -> Iterator[str]:
        for path in sorted(self.clean.glob("*.jsonl")):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    # Other digits of the hash than those that choose the split.
                    chosen = int(text_hash(text)[16:32], 16) < share * 2**64
                    if chosen and not in_heldout(text, self.heldout_fraction):
                        yield text


class WriteShards(PipelineStep):
    """Per task: tokenises documents as [bos] text [eos] into shards of either split, listed in records/RANK.json.

    A text that does not decode to itself is an error: the corpus would not be what the model is measured on.
    """

    type = "📦 - SHARDS"
    name = "write shards"

    def __init__(
        self, settings: TokenizerSettings, heldout_fraction: float, shard_tokens: int, output: Path, records: Path
    ):
        super().__init__()
        self.settings = settings
        self.heldout_fraction = heldout_fraction
        self.shard_tokens = shard_tokens
        self.output = output
        self.records = records

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        path = self.output / "tokenizer.json"
        info, tokenizer = describe(path, self.settings), tokenizers.load(path)
        dtype = np.dtype(token_dtype(info.vocab_size))
        train, heldout = (
            ShardWriter(self.output / split, f"{split}-{rank:05d}", dtype=dtype, shard_tokens=self.shard_tokens)
            for split in SPLITS
        )
        with train, heldout:
            for documents in batched(data, BATCH):
                texts = [document.text for document in documents]
                encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for document, encoding in zip(documents, encodings, strict=True):
                    ids = encoding.ids
                    proof = int(text_hash(document.text)[32:48], 16) % PROOF == 0
                    if proof and tokenizer.decode(ids, skip_special_tokens=False) != document.text:
                        raise InputError(f"tokenizer {path}: document {document.id!r} does not decode to its own text")
                    side = heldout if in_heldout(document.text, self.heldout_fraction) else train
                    side.write(
                        np.array([info.bos, *ids, info.eos]),
                        id=document.id,
                        source=document.metadata["source"],
                        text_bytes=text_bytes(document),
                        language=document.metadata.get("language", ""),
                        key=document.metadata.get("key", ""),
                    )
        self.records.mkdir(parents=True, exist_ok=True)
        record = {"train": train.shards, "heldout": heldout.shards}
        replace_file(self.records / f"{rank:05d}.json", SHARDS.dump_json(record))
        return None


class WriteManifests(PipelineStep):
    """In one task, when all shards are written: a manifest and a copy of the tokenizer beside each split's shards."""

    type = "📦 - SHARDS"
    name = "write manifests"

    def __init__(
        self,
        settings: TokenizerSettings,
        heldout_fraction: float,
        sources: dict[str, Source],
        output: Path,
        records: Path,
    ):
        super().__init__()
        self.settings = settings
        self.heldout_fraction = heldout_fraction
        self.sources = {name: SourceInfo(source.category, source.epochs) for name, source in sources.items()}
        self.output = output
        self.records = records

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        records = [SHARDS.validate_json(path.read_bytes()) for path in sorted(self.records.glob("*.json"))]
        source = self.output / "tokenizer.json"
        info = describe(source, self.settings)
        for split in splits(self.heldout_fraction):
            shards = [shard for record in records for shard in record[split]]
            if not shards:
                raise InputError(f"{split} split: no document is left for it; see the drops in {self.output / 'drops'}")
            replace_file(self.output / split / source.name, source.read_bytes())
            Manifest.create(self.output / split, info, shards, self.sources).save()
        return data


def splits(heldout_fraction: float) -> tuple[str, ...]:
    """The splits that a run writes."""
    return SPLITS if heldout_fraction > 0 else SPLITS[:1]


def describe(path: str | Path, settings: TokenizerSettings):
    """The manifest's entry for a tokenizer under the names that the settings give its special entries."""
    return tokenizers.describe(path, bos=settings.bos, eos=settings.eos, pad=settings.pad)
