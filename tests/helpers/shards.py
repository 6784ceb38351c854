"""Small shards of learnable text, made once for tests that train."""

import hashlib
from pathlib import Path

import numpy as np

from data_pipeline.shards.content import TokenizerInfo, token_dtype
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.tokenizer import train

TEXT = "the cat sat on the mat and the dog sat on the log while {n} birds sang {n} songs for the {n} of them. "


def make_text_shards(directory: Path, *, vocab_size: int = 401, documents: int = 200) -> Manifest:
    """Documents of numbered sentences, tokenised by a tokenizer trained on them, with a saved manifest."""
    draw = np.random.default_rng(0)
    texts = ["".join(TEXT.format(n=draw.integers(100)) for _ in range(draw.integers(1, 9))) for _ in range(documents)]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train(lambda: texts, vocab_size)
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    info = TokenizerInfo(
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        vocab_size=tokenizer.get_vocab_size(),
        bos=1,
        eos=2,
        pad=0,
    )
    dtype = np.dtype(token_dtype(info.vocab_size))
    with ShardWriter(directory, "part", dtype=dtype, shard_tokens=4000) as writer:
        for number, text in enumerate(texts):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            writer.write(np.array([1, *ids, 2]), id=f"d{number}", source="test", text_bytes=len(text.encode()))
    manifest = Manifest.create(directory, info, writer.shards)
    manifest.save()
    return manifest
