"""Held-out figures: independent of how documents are batched, and right by hand."""

import dataclasses
import gzip
import math
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.tokenizer import train
from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.evaluation.baselines import compressor_bits_per_byte, unigram_bits_per_byte
from megatron_tn.evaluation.perplexity import Documents, document_nats, evaluate_documents
from megatron_tn.evaluation.scores import row_scores
from megatron_tn.evaluation.token_bytes import token_bytes
from megatron_tn.held_out import held_out_documents, laid_end_to_end
from megatron_tn.parallel.collectives import all_gather
from megatron_tn.parallel.context import ParallelContext
from tests.data_pipeline.shard_factory import make_shards
from tests.helpers.models import COSFORMER, HYBRID, TINY, TRANSFORMER, TRANSNORMER_2022, reference_model
from tests.helpers.ranks import run_shared, this_device
from tests.helpers.shards import make_text_shards


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


def scores_of_shares(
    config: ModelConfig, documents: list[np.ndarray], options: dict[str, int]
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """On each rank: the scores of all documents, by as many forward passes as on the other ranks."""
    model = reference_model(config, seed=1, dtype=torch.float32).to(this_device())
    model.context = ParallelContext.create()
    with mock.patch.object(model, "forward", wraps=model.forward) as forward:
        found = [tuple(scores) for scores in row_scores(model, documents, greedy=True, **options)]
    passes = all_gather(torch.tensor([forward.call_count], device=this_device()), model.context.data)
    assert passes.unique().numel() == 1
    return found


@pytest.mark.parametrize(("batch_tokens", "window"), [(64, 16), (4096, 256), (30, 7)], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ranks_share_documents_and_get_the_scores_of_all(documents, device, batch_tokens, window):
    ranks = 3 if device == "cpu" else 2
    if device == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip("needs 2 GPUs")
    options = {"batch_tokens": batch_tokens, "window": window}
    config = dataclasses.replace(COSFORMER, max_length=8) if window == 7 else TINY  # shorter than ranks' padding
    model = reference_model(config, seed=1, dtype=torch.float32).to(device)
    alone = [tuple(scores) for scores in row_scores(model, documents, greedy=True, **options)]
    for found in run_shared(ranks, scores_of_shares, config, documents, options, device=device):
        assert [index for index, *_ in found] == [index for index, *_ in alone]
        for mine, wanted in zip(found, alone, strict=True):
            np.testing.assert_array_equal(mine[1], wanted[1])
            np.testing.assert_array_equal(mine[2], wanted[2])


def test_sums_by_source_and_by_position(documents):
    model = reference_model(TINY, seed=1)
    sources = [f"{number % 3}" for number in range(len(documents))]
    token_bytes = np.arange(TINY.vocab_size)
    found = evaluate_documents(model, Documents(documents, [2 * len(ids) for ids in documents], sources, token_bytes))
    nats = document_nats(model, documents)
    assert found.tokens == sum(len(ids) - 1 for ids in documents)
    assert found.nats == pytest.approx(sum(nats))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.text_bytes)
    assert found.sources["1"].nats == pytest.approx(sum(nats[1::3]))
    assert found.sources["1"].text_bytes == sum(2 * len(ids) for ids in documents[1::3])
    # After 4 to 7 tokens: predictions of the tokens at 4, 5, 6, 7.
    parts = {score.index: score.nats[3:7].sum() for score in row_scores(model, documents)}
    assert found.positions[4].nats == pytest.approx(sum(parts.values()))
    assert found.positions[4].tokens == sum(len(ids[4:8]) for ids in documents)
    assert found.positions[4].text_bytes == sum(int(ids[4:8].sum()) for ids in documents)
    assert sum(sums.nats for sums in found.positions.values()) == pytest.approx(found.nats)
    assert list(found.positions) == [1, 2, 4, 8, 16, 32]


ARCHITECTURES = {config.name: config for config in (TINY, TRANSFORMER, HYBRID, TRANSNORMER_2022)}


@pytest.mark.parametrize(("batch_tokens", "window"), [(4096, 256), (100, 7)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_of_parts_of_rows_are_those_of_the_logits(documents, name, batch_tokens, window):
    """With fp32 weights, as evaluated on a CPU."""
    model = reference_model(ARCHITECTURES[name], seed=1, dtype=torch.float32)
    first = [1 + number % max(len(ids) - 1, 1) for number, ids in enumerate(documents)]
    options = {"batch_tokens": batch_tokens, "window": window}
    for (index, nats, greedy), plain in zip(
        row_scores(model, documents, first, greedy=True, **options),
        row_scores(model, documents, first, **options),
        strict=True,
    ):
        ids = torch.from_numpy(documents[index])
        logits = model(ids.view(1, -1)).logits[0, first[index] - 1 : -1].detach()
        expected = torch.nn.functional.cross_entropy(logits, ids[first[index] :], reduction="none")
        np.testing.assert_allclose(nats, expected, atol=1e-5)
        np.testing.assert_allclose(plain.nats, expected, atol=1e-5)
        assert greedy.tolist() == (logits.argmax(-1) == ids[first[index] :]).tolist()


def test_bytes_of_tokens_add_up_to_those_of_texts(tmp_path):
    texts = ["naïve 数字 \x00\n\tdef f(x):\n    return x", "the cat"]
    ours = train(lambda: ["the cat sat on the mat"] * 30, 380)
    bytelevel = Tokenizer(models.BPE())
    bytelevel.pre_tokenizer, bytelevel.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytelevel.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    for tokenizer in (ours, bytelevel):
        for text in texts:
            assert token_bytes(tokenizer)[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert token_bytes(ours)[:4].tolist() == [0, 0, 0, 0]


def test_held_out_documents_are_of_all_sources(tmp_path):
    manifest = make_shards(tmp_path, documents=40, sources={"a": 0.75, "b": 0.2, "c": 0.05})
    found = held_out_documents(str(tmp_path / "manifest.json"), 16)
    assert {name: found.sources.count(name) for name in manifest.sources} == {"a": 6, "b": 5, "c": 2}
    assert len(held_out_documents(str(tmp_path / "manifest.json"), 0).tokens) == 40
    assert found.token_bytes is None  # no tokenizer is there
    with pytest.raises(ConfigError, match="max_document_tokens=2 cuts documents, and to count"):
        held_out_documents(str(tmp_path / "manifest.json"), 0, 2)


def test_a_cut_document_has_the_bytes_of_its_tokens(tmp_path):
    make_text_shards(tmp_path)
    manifest = str(tmp_path / "manifest.json")
    whole, cut = held_out_documents(manifest, 0), held_out_documents(manifest, 0, 5)
    assert [ids.tolist() for ids in cut.tokens] == [ids[:5].tolist() for ids in whole.tokens]
    assert cut.text_bytes == [whole.token_bytes[ids[:5]].sum() for ids in whole.tokens] < whole.text_bytes


def test_documents_laid_end_to_end(tmp_path):
    """Every token once, in an order that stays; what a position sees is what a model that reads on carries there."""
    make_text_shards(tmp_path)
    documents = held_out_documents(str(tmp_path / "manifest.json"), 6)
    length = sum(map(len, documents.tokens)) // 3
    found = laid_end_to_end(documents, length)
    assert [len(ids) for ids in found.tokens] == [length] * 3
    laid, given = np.concatenate(found.tokens), np.concatenate(documents.tokens)
    assert (
        np.abs(np.bincount(laid, minlength=512) - np.bincount(given, minlength=512)).sum() == len(given) - len(laid) < 3
    )
    assert laid[: len(given)].tolist() != given[: len(laid)].tolist()
    again = laid_end_to_end(documents, length)
    assert all(np.array_equal(a, b) for a, b in zip(again.tokens, found.tokens, strict=True))
    model = reference_model(dataclasses.replace(TINY, vocab_size=512), seed=1)
    sums = evaluate_documents(model, found, window=16)
    assert (sums.tokens, sums.text_bytes) == (3 * length - 3, sum(found.text_bytes))
    with torch.no_grad():
        whole = model.loss(*(torch.from_numpy(found.tokens[1])[None, part] for part in (slice(-1), slice(1, None))))
    nats = document_nats(model, found.tokens[1:2], window=16)
    assert abs(nats[0] / (length - 1) - whole.item()) < 1e-6
    with pytest.raises(ConfigError, match=r"sequence_tokens=9999999 is more than the \d+ tokens"):
        laid_end_to_end(documents, 9999999)


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
