"""Isolated documents in the stream: boundaries are where the documents' are."""

import numpy as np
import pytest
import torch

from data_pipeline.stream import IGNORED, InputError, build_stream
from tests.data_pipeline.shard_factory import BOS, EOS, PAD, make_shards

LENGTH = 40


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), documents=150, longest=30)


def test_no_target_crosses_a_document(manifest):
    isolated = build_stream(manifest, sequence_length=LENGTH, seed=1, isolate_documents=True)
    cut = build_stream(manifest, sequence_length=LENGTH, seed=1)
    for index in range(isolated.samples_per_epoch):
        sample, plain = isolated.sample(index), cut.sample(index)
        assert torch.equal(sample.tokens, plain.tokens)
        ends = sample.tokens == EOS
        assert (sample.targets[ends] == IGNORED).all()
        assert torch.equal(sample.targets[~ends], plain.targets[~ends])
        assert (plain.targets[ends] == BOS).sum() >= ends.sum() - 1  # all but the epoch's last document


def test_cu_seqlens_hold_every_boundary_and_have_a_fixed_length(manifest):
    stream = build_stream(manifest, sequence_length=LENGTH, seed=1, isolate_documents=True)
    for first in range(0, stream.samples_per_epoch, 3):
        batch = stream.batch(range(first, first + 3))
        assert batch.tokens.shape == batch.targets.shape == (1, 3 * LENGTH)
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.shape == (3 * stream.max_documents + 1,)
        boundaries = batch.cu_seqlens.tolist()
        assert boundaries == sorted(boundaries)
        assert boundaries[0] == 0
        assert boundaries[-1] == 3 * LENGTH
        tokens = batch.tokens[0].numpy()
        starts = set(np.flatnonzero(tokens == BOS)) | {0, LENGTH, 2 * LENGTH, 3 * LENGTH}
        padding = np.flatnonzero(tokens == PAD)
        starts |= {padding[0]} if len(padding) else set()
        assert set(boundaries) == starts


def test_the_bound_holds_for_the_shortest_documents(tmp_path):
    manifest = make_shards(tmp_path, documents=300, longest=4, shard_tokens=100)
    for length in (1, 2, 3, 7, 50):
        stream = build_stream(manifest, sequence_length=length, seed=1, isolate_documents=True)
        most = max(len(stream.sample(index).document_starts) for index in range(stream.samples_per_epoch))
        assert most <= stream.max_documents


def test_a_bound_that_could_be_passed_is_refused(manifest):
    with pytest.raises(InputError, match=r"max_documents=3 is below \d+: sequence_length=40"):
        build_stream(manifest, sequence_length=LENGTH, seed=1, isolate_documents=True, max_documents=3)


def test_without_isolation_tokens_come_as_cut(manifest):
    batch = build_stream(manifest, sequence_length=LENGTH, seed=1).batch([4, 2])
    assert batch.cu_seqlens is None
    assert batch.tokens.shape == (2, LENGTH)
    assert batch.indices == (4, 2)
