"""Small shards of random documents, for tests that need tokens and no text."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipeline.shards.content import SourceInfo, TokenizerInfo, token_dtype
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.stream import Batch, BatchLoader
from data_pipeline.stream import count as counting

PAD, BOS, EOS = 0, 1, 2


def make_shards(
    directory: Path,
    *,
    documents: int = 60,
    shard_tokens: int = 400,
    vocab_size: int = 5000,
    longest: int = 90,
    seed: int = 0,
    sources: dict[str, float] | None = None,
    categories: dict[str, str] | None = None,
    epochs: dict[str, float] | None = None,
    languages: tuple[str, ...] = ("",),
) -> Manifest:
    """Saves a manifest of documents of 3 to `longest` tokens: bos, random ids, eos. `sources`: their shares of the
    documents; the ids of each source leave a remainder of their own when divided by the number of sources."""
    shares = sources or {"random": 1.0}
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
        number = 0
        for remainder, (source, share) in enumerate(sorted(shares.items())):
            for _ in range(round(documents * share)):
                body = random.integers(4, vocab_size, random.integers(1, longest - 1))
                if sources:
                    body = random.integers(2, vocab_size // len(shares), len(body)) * len(shares) + remainder
                writer.write(
                    np.array([BOS, *body, EOS]),
                    id=f"d{number}",
                    source=source,
                    text_bytes=3 * len(body),
                    language=languages[number % len(languages)],
                )
                number += 1
    known = {
        name: SourceInfo(category=(categories or {}).get(name, ""), epochs=(epochs or {}).get(name, 1.0))
        for name in shares
    }
    manifest = Manifest.create(directory, info, writer.shards, known)
    manifest.save()
    return manifest


def batches_hash(batches: Iterable[Batch]) -> str:
    """sha256 over indices, tokens and targets of the batches, in order; independent of the division into batches: a
    global batch and the sequence of its shares have the same hash."""
    parts = [hashlib.sha256() for _ in range(3)]
    for batch in batches:
        for part, values in zip(parts, (torch.tensor(batch.indices), batch.tokens, batch.targets), strict=True):
            part.update(values.contiguous().numpy().tobytes())
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


def global_hashes(streams: Sequence, plan: Callable, steps: range, **options) -> list[str]:
    """Hash of each step's global batch, put together from what the ranks read, each its own stream. options: of
    `BatchLoader`."""
    loaders = [
        BatchLoader(stream, plan, rank=rank, size=len(streams), step=steps.start, **options)
        for rank, stream in enumerate(streams)
    ]
    try:
        ranks = [iter(loader) for loader in loaders]
        return [batches_hash(itertools.chain.from_iterable(next(rank) for rank in ranks)) for _ in steps]
    finally:
        for loader in loaders:
            loader.close()


def stop_at_the_fourth_shard(monkeypatch) -> list[str]:
    """Interrupts `count` when it begins the fourth shard; returns the names of all that it begins, then and later."""
    begun, work = [], counting.count_shard

    def stopping(manifest, filter, shard):
        begun.append(shard.name)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return work(manifest, filter, shard)

    monkeypatch.setattr(counting, "count_shard", stopping)
    return begun
