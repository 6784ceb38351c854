"""Small shards of random documents, for tests that need tokens and no text."""

import hashlib
from pathlib import Path

import numpy as np

from data_pipeline.shards.manifest import Manifest, TokenizerInfo, token_dtype
from data_pipeline.shards.writer import ShardWriter

PAD, BOS, EOS = 0, 1, 2


def make_shards(
    directory: Path,
    *,
    documents: int = 60,
    shard_tokens: int = 400,
    vocab_size: int = 5000,
    longest: int = 90,
    seed: int = 0,
) -> Manifest:
    """Saves a manifest of documents of 3 to `longest` tokens: bos, random ids, eos."""
    random = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = b"{}"
    (directory / "tokenizer.json").write_bytes(tokenizer)
    info = TokenizerInfo(
        file="tokenizer.json",
        sha256=hashlib.sha256(tokenizer).hexdigest(),
        vocab_size=vocab_size,
        bos=BOS,
        eos=EOS,
        pad=PAD,
    )
    with ShardWriter(directory, "part", dtype=np.dtype(token_dtype(vocab_size)), shard_tokens=shard_tokens) as writer:
        for number in range(documents):
            body = random.integers(4, vocab_size, random.integers(1, longest - 1))
            writer.write(np.array([BOS, *body, EOS]), id=f"d{number}", source="random", text_bytes=3 * len(body))
    manifest = Manifest.create(directory, info, writer.shards)
    manifest.save()
    return manifest
