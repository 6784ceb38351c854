"""Held-out documents of a shard folder, and a model's loss on them."""

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.shards import read_shard
from data_pipeline.stream import InputError, Manifest
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.evaluation.perplexity import AFTER, Documents, evaluate_documents
from megatron_tn.evaluation.token_bytes import token_bytes
from megatron_tn.model.base import Model

CPU_TOKENS = 4096  # tokens of a batch
GPU_ELEMENTS = 1 << 26  # of one activation [tokens, D]: a narrow model's small batch leaves a GPU waiting for launches


def problems_of_held_out(manifest: Manifest, setting: str, vocab_size: int) -> list[str]:
    """Reasons why a model of `vocab_size` entries cannot be evaluated on these shards. setting: the one that names
    them."""
    totals = manifest.totals
    if totals.tokens <= totals.documents:  # a document's first token is given
        return [f"{setting} holds nothing to predict: {totals.tokens} tokens in {totals.documents} documents"]
    if manifest.tokenizer.vocab_size > vocab_size:
        return [
            f"{setting} was made with a tokenizer of {manifest.tokenizer.vocab_size} entries, more than "
            f"model.vocab_size={vocab_size}"
        ]
    return []


def held_out_loss(model: Model, config: TrainConfig, progress: Callable[[int, int], None]) -> dict[str, float]:
    """For the training loop: held-out figures, by the names that the journal has for them. progress(n, tokens): told
    of n more documents done, of so many tokens. Collective, see `row_scores`."""
    documents = held_out_documents(config.evaluation.manifest, config.evaluation.max_documents)
    window = config.data.sequence_length
    batch_tokens = CPU_TOKENS
    if next(model.parameters()).is_cuda:  # memory suffices for the tokens of a microbatch
        most = GPU_ELEMENTS // config.model.embed_dim
        batch_tokens = max(min(config.data.micro_batch * window, most), CPU_TOKENS)
    found = evaluate_documents(model, documents, window=window, batch_tokens=batch_tokens, progress=progress)
    values = {"heldout_loss": found.nats_per_token, "heldout_bits_per_byte": found.bits_per_byte}
    if len(found.sources) > 1:
        values |= {f"heldout_bits_per_byte/{name}": sums.bits_per_byte for name, sums in found.sources.items()}
    return values | {f"{AFTER}{first}": sums.nats_per_token for first, sums in found.positions.items()}


@functools.lru_cache(maxsize=2)
def held_out_documents(manifest: str, most: int, longest: int = 0) -> Documents:
    """The first documents of a shard folder, `most` in all (0: all): equally many of each source, where it has them.
    longest: tokens that each is cut to, bos included; 0: none is cut. Raises ConfigError where documents are to be cut
    and the bytes of a token are not known."""
    shards = load_manifest(manifest)
    tokens, text_bytes, sources = [], [], []
    for number, source in enumerate(shards.sources):
        share = most // len(shards.sources) + (number < most % len(shards.sources)) if most else None
        of_source = (
            document for shard in shards.shards if shard.source == source for document in read_shard(shards, shard)
        )
        for document in itertools.islice(of_source, share):
            tokens.append(document.tokens)
            text_bytes.append(document.metadata["bytes"])
            sources.append(source)
    of_token = _token_bytes(shards, tokens, text_bytes)
    if longest and any(len(ids) > longest for ids in tokens):
        if of_token is None:
            raise ConfigError(
                [
                    f"max_document_tokens={longest} cuts documents, and to count the bytes of a cut document needs the "
                    f"tokenizer beside manifest={manifest}, which is missing; put it there, or set "
                    "max_document_tokens=0"
                ]
            )
        tokens = [ids[:longest] for ids in tokens]
        text_bytes = [int(of_token[ids].sum()) for ids in tokens]
    return Documents(tokens, text_bytes, sources, of_token)


def laid_end_to_end(documents: Documents, length: int) -> Documents:
    """The documents in a random order, always the same, one after the other, cut into sequences of `length` tokens;
    what is left over is dropped. Training packs documents so, too. The mixture of texts is the same at every position,
    so what differs by position is the model's.

    Raises:
        ConfigError: fewer tokens than `length`, or the bytes of a token are not known.
    """
    total = sum(map(len, documents.tokens))
    if documents.token_bytes is None:
        raise ConfigError(
            f"sequence_tokens={length} cuts documents, and to count the bytes of a cut document needs the tokenizer "
            "beside the manifest, which is missing; put it there, or set sequence_tokens=0"
        )
    if total < length:
        raise ConfigError(f"sequence_tokens={length} is more than the {total} tokens of all held-out documents")
    order = np.random.default_rng(0).permutation(len(documents.tokens))
    ids = np.concatenate([documents.tokens[index] for index in order])
    sequences = list(ids[: total // length * length].reshape(-1, length))
    text_bytes = [int(documents.token_bytes[each[1:]].sum()) for each in sequences]
    return Documents(sequences, text_bytes, ["end to end"] * len(sequences), documents.token_bytes)


def _token_bytes(shards: Manifest, tokens: Sequence[np.ndarray], text_bytes: Sequence[int]) -> np.ndarray | None:
    """UTF-8 bytes of each id; None where the shards' tokenizer is not beside them, or normalises texts, so that the
    bytes of a document's tokens are not those of its text."""
    try:
        found = token_bytes(Tokenizer.from_file(str(shards.directory / shards.tokenizer.file)))
    except Exception:  # the library raises nothing narrower
        return None
    try:
        agrees = all(found[ids].sum() == size for ids, size in zip(tokens, text_bytes, strict=True))
    except IndexError:
        return None
    return found if agrees else None


def load_manifest(path: str) -> Manifest:
    try:
        return Manifest.load(path)
    except InputError as error:
        raise ConfigError(error.problems) from None
