"""Held-out bits per byte of a checkpoint or a released model, beside what simpler models make of the same bytes.

python -m megatron_tn.evaluate checkpoint=runs/demo/checkpoints/latest manifest=runs/demo/data/heldout/manifest.json
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.shards import read_documents
from data_pipeline.stream import InputError, Manifest
from megatron_tn.cli import command
from megatron_tn.config import ConfigError, EvaluateConfig, TrainConfig, out_of_bounds, unwritable
from megatron_tn.evaluation.baselines import compressor_bits_per_byte, unigram_bits_per_byte
from megatron_tn.evaluation.perplexity import evaluate_documents
from megatron_tn.evaluation.progress import DocumentProgress
from megatron_tn.loading import load_any_model, load_tokenizer, other_tokenizer, resolve_checkpoint
from megatron_tn.model.base import Model


@command(EvaluateConfig, "evaluate")
def main(config: EvaluateConfig) -> None:
    check(config)
    model = load_any_model(config.checkpoint, config.device, config.precision)
    tokenizer = load_tokenizer(config.tokenizer, config.checkpoint)
    held_out, setting = _manifest(config.manifest), f"manifest={config.manifest}"
    problems = problems_of_held_out(held_out, setting, model.config.vocab_size)
    if problems := problems or other_tokenizer(held_out, setting, config.tokenizer, config.checkpoint):
        raise ConfigError(problems)
    documents, text_bytes = held_out_documents(config.manifest, config.max_documents)
    tokens = sum(map(len, documents))
    with DocumentProgress("evaluate", len(documents), tokens) as shown:
        found = evaluate_documents(
            model, documents, text_bytes, batch_tokens=config.batch_tokens, progress=shown.advance
        )
    result: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        "manifest": config.manifest,
        "documents": found.documents,
        "tokens": found.tokens,
        "text_bytes": found.text_bytes,
        "nats_per_token": found.nats_per_token,
        "bits_per_byte": {"model": found.bits_per_byte},
    }
    if config.train_manifest:
        training = (document.tokens for document in read_documents(_manifest(config.train_manifest)))
        result["bits_per_byte"]["unigram"] = unigram_bits_per_byte(
            training, documents, found.text_bytes, model.config.vocab_size
        )
    with DocumentProgress("compress", len(documents), tokens) as shown:
        result["bits_per_byte"] |= compressor_bits_per_byte(_texts(documents, tokenizer, shown))
    if config.output:
        Path(config.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _texts(documents: list[np.ndarray], tokenizer: Tokenizer, shown: DocumentProgress) -> Iterator[bytes]:
    for ids in documents:
        yield tokenizer.decode(list(ids)).encode()
        shown.advance(1, len(ids))


def check(config: EvaluateConfig) -> None:
    """Raises ConfigError with every problem that can be known before anything is read."""
    problems = list(out_of_bounds(config).values())
    try:
        resolve_checkpoint(config.checkpoint)
    except ConfigError as error:
        problems += error.problems
    if not config.manifest:
        problems.append("manifest is not set: name the manifest.json of held-out shards")
    problems += unwritable("output", config.output)
    if problems:
        raise ConfigError(problems)


def problems_of_held_out(manifest: Manifest, setting: str, vocab_size: int) -> list[str]:
    """Why a model of so many entries cannot be evaluated on these shards. setting: the one that names them."""
    totals = manifest.totals
    if totals.tokens <= totals.documents:  # a document's first token is given
        return [f"{setting} holds nothing to predict: {totals.tokens} tokens in {totals.documents} documents"]
    if manifest.tokenizer.vocab_size > vocab_size:
        return [
            f"{setting} was made with a tokenizer of {manifest.tokenizer.vocab_size} entries, more than "
            f"model.vocab_size={vocab_size}"
        ]
    return []


def held_out_loss(
    model: Model, config: TrainConfig, progress: Callable[[int, int], None] = lambda documents, tokens: None
) -> dict[str, float]:
    """For the training loop: the held-out loss as two named figures. Every rank evaluates the same documents, so that
    engines that gather parameters in the forward pass stay in step. progress(n, tokens): told of n
    more documents done, of so many tokens."""
    documents, text_bytes = held_out_documents(config.evaluation.manifest, config.evaluation.max_documents)
    found = evaluate_documents(model, documents, text_bytes, window=config.data.sequence_length, progress=progress)
    return {"heldout_loss": found.nats_per_token, "heldout_bits_per_byte": found.bits_per_byte}


@functools.lru_cache(maxsize=2)
def held_out_documents(manifest: str, most: int) -> tuple[list[np.ndarray], list[int]]:
    """Ids and UTF-8 bytes of the first `most` documents (0: all) of a shard folder."""
    documents, text_bytes = [], []
    for document in read_documents(_manifest(manifest)):
        documents.append(document.tokens)
        text_bytes.append(document.metadata["bytes"])
        if len(documents) == most:
            break
    return documents, text_bytes


def _manifest(path: str) -> Manifest:
    try:
        return Manifest.load(path)
    except InputError as error:
        raise ConfigError(error.problems) from None


if __name__ == "__main__":
    main()
