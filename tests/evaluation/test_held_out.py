"""Held-out figures: independent of how documents are batched, and right by hand."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pytest
import torch

from megatron_tn.evaluation.baselines import compressor_bits_per_byte, unigram_bits_per_byte
from megatron_tn.evaluation.perplexity import document_nats, evaluate_documents
from tests.helpers.models import TINY, reference_model


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [np.array([1, *draw.integers(3, 101, draw.integers(1, 60)), 2]) for _ in range(17)]


@pytest.mark.parametrize(("batch_tokens", "window"), [(8, 8), (64, 16), (4096, 256), (30, 7)], ids=str)
def test_a_document_scores_the_same_however_it_is_batched(documents, batch_tokens, window):
    model = reference_model(TINY, seed=1)
    found = document_nats(model, documents, batch_tokens=batch_tokens, window=window)
    for ids, nats in zip(documents, found, strict=True):
        tokens = torch.from_numpy(ids).view(1, -1)
        alone = model(tokens[:, :-1], targets=tokens[:, 1:], reduction="sum").loss.item()
        assert nats == pytest.approx(alone, rel=1e-6)


def test_sums(documents):
    model = reference_model(TINY, seed=1)
    found = evaluate_documents(model, documents, [len(ids) for ids in documents])
    assert found.tokens == sum(len(ids) - 1 for ids in documents)
    assert found.nats == pytest.approx(sum(document_nats(model, documents)))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.text_bytes)


def test_scoring_leaves_random_state_and_gradients_alone(documents):
    model = reference_model(TINY, seed=1)
    before = torch.get_rng_state()
    document_nats(model, documents)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unigram_by_hand():
    # Counts with one added: ids 0..3 -> 1, 1, 1 + 3, 1 + 1; of 8.
    training = [np.array([1, 2, 2, 3]), np.array([1, 2])]
    bits = unigram_bits_per_byte(training, [np.array([1, 2, 0])], text_bytes=2, vocab_size=4)
    assert bits == pytest.approx((-math.log2(4 / 8) - math.log2(1 / 8)) / 2)


def test_compressors_see_all_texts_as_one_file():
    texts = [b"abc" * 50, b"abc" * 70]
    found = compressor_bits_per_byte(texts)
    assert found["gzip -9"] == 8 * len(gzip.compress(b"".join(texts), 9)) / 360
    assert found["xz -9"] > 0
