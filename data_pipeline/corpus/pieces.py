"""Cuts documents into pieces, so that a model is evaluated at no longer context than it was trained with."""

import shutil
from pathlib import Path

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_documents
from data_pipeline.shards.token_bytes import token_bytes
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.tokenizer import load

SHARD_TOKENS = 1_000_000


def cut(manifest: Manifest, length: int, folder: Path) -> Manifest:
    """Writes the documents as pieces of at most `length` >= 2 tokens, bos first, to `folder`; returns their manifest.
    Every token of a document, eos included, follows bos or the tokens before it in exactly one piece."""
    sizes = token_bytes(load(manifest.directory / manifest.tokenizer.file))
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "pieces", dtype=manifest.dtype, shard_tokens=SHARD_TOKENS) as writer:
        for document in read_documents(manifest):
            record, rest = document.metadata, document.tokens[1:]
            if sizes[rest].sum() != record["bytes"]:
                raise InputError(f"document {record['id']}: its tokens are not those of its {record['bytes']} bytes")
            for number, start in enumerate(range(0, len(rest), length - 1)):
                own = rest[start : start + length - 1]
                writer.write(
                    np.concatenate((document.tokens[:1], own)),
                    id=f"{record['id']}#{number}",
                    source=record["source"],
                    text_bytes=int(sizes[own].sum()),
                    language=record["language"],
                )
    info = manifest.tokenizer
    shutil.copyfile(manifest.directory / info.file, folder / info.file)
    pieces = Manifest.create(folder, info, writer.shards, manifest.sources)
    pieces.save()
    return pieces
