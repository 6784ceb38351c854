"""The stream as a WebDataset pipeline: its stages can be looked into, inserted, replaced, and order does not move."""

import dataclasses
import gc
import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import webdataset

from data_pipeline.shards.reading import read_documents
from data_pipeline.stream import (
    BatchLoader,
    DocumentStage,
    InputError,
    ScoreFilter,
    StreamState,
    batches,
    build_stream,
    compose,
    load_document_stage,
    load_filter,
    token_stages,
)
from data_pipeline.stream import count as counting
from data_pipeline.stream import loader as loader_module
from data_pipeline.stream import pipeline as stages_of
from data_pipeline.stream.loader import _end_by_parent_alone
from data_pipeline.stream.score_filter import counts_file
from tests.data_pipeline.shard_factory import BOS, EOS, batches_hash, make_shards

LENGTH = 16


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), documents=120, languages=("en", "de"))


def plan(step):
    return (step * 8, 8) if step < 20 else None


def masked(document):
    """Some tokens become another, which ones depends on the document alone."""
    draw = np.random.default_rng(int(hashlib.sha256(document.key.encode()).hexdigest()[:8], 16))
    hidden = draw.random(len(document.tokens)) < 0.3
    return np.where(hidden & (document.tokens > EOS), 3, document.tokens)


class German:
    """A filter of a user's own: by what the index says, without scores."""

    filter_hash = hashlib.sha256(b"german-1").hexdigest()

    def kept(self, read, shard, index):
        from data_pipeline.shards.index import LANGUAGE, language_number

        return index[:, LANGUAGE] == language_number("de"), ""


german = German()
MASKED = DocumentStage("masked-1", masked)


def everything(stream):
    return stream.batch(range(stream.samples_per_epoch))


def test_a_webdataset_pipeline_of_the_stages_gives_the_stream_s_batches(manifest):
    stages = token_stages(manifest, sequence_length=LENGTH, seed=3)
    pipeline = webdataset.DataPipeline(*stages, batches(plan, micro_batch=4))
    stream = build_stream(manifest, sequence_length=LENGTH, seed=3)
    found = list(itertools.chain.from_iterable(pipeline))
    assert len(found) == 40
    assert batches_hash(found) == batches_hash([stream.batch(range(160))])
    # After batches, any stage of webdataset's own follows.
    assert list(pipeline.compose(webdataset.map(len), webdataset.slice(3))) == [2, 2, 2]


def test_leaving_a_pipeline_early_stops_its_reading(manifest):
    import threading

    pipeline = webdataset.DataPipeline(
        *token_stages(manifest, sequence_length=LENGTH, seed=3), batches(lambda step: (step, 1), micro_batch=1)
    )
    steps = iter(pipeline)
    next(steps)
    assert any(thread.name == "read-ahead" for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_documents_can_be_looked_at_before_they_are_packed(manifest):
    *before, _pack = token_stages(manifest, sequence_length=LENGTH, seed=3)
    stored = list(
        webdataset.WebDataset([str(manifest.directory / s.name) for s in manifest.shards], shardshuffle=False)
    )
    seen = list(webdataset.DataPipeline(*before))
    assert [sample["__key__"] for sample in seen] == [sample["__key__"] for sample in stored]
    for sample, document in zip(seen, read_documents(manifest), strict=True):
        assert np.array_equal(sample["tokens"], document.tokens)
        assert (sample["source"], sample["language"]) == (document.metadata["source"], document.metadata["language"])


def test_a_stage_of_one_s_own_sees_whole_documents_and_moves_nothing(manifest):
    plain, edited = (
        build_stream(manifest, sequence_length=LENGTH, seed=3, document_stages=stages) for stages in ((), (MASKED,))
    )
    before, after = everything(plain), everything(edited)
    changed = before.tokens != after.tokens
    assert 0.1 < changed.float().mean() < 0.5
    assert (after.tokens[changed] == 3).all()
    corpus = compose(token_stages(manifest, sequence_length=LENGTH, seed=3, document_stages=[MASKED])[:-1])
    wanted = np.concatenate([sample["tokens"] for sample in corpus])
    fed = after.targets[after.targets != -100].numpy()
    missing = np.bincount(wanted, minlength=5000) - np.bincount(fed, minlength=5000)
    assert missing.sum() == 1  # the first token of the epoch
    assert (missing >= 0).all()
    assert edited.stream_hash != plain.stream_hash
    with pytest.raises(InputError, match="document stages"):
        plain.restore(edited.state(3))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_topologies_and_resumption_with_a_stage_of_one_s_own(manifest):
    def stream():
        return build_stream(manifest, sequence_length=LENGTH, seed=3, document_stages=[MASKED])

    expected = [batches_hash([stream().batch(range(*place))]) for place in ((s * 8, s * 8 + 8) for s in range(20))]
    resumed = stream()
    step = resumed.restore(StreamState.from_json(stream().state(5 * 8).to_json())) // 8
    loaders = [
        BatchLoader(resumed, plan, micro_batch=2, rank=rank, size=2, workers=workers, step=step)
        for rank, workers in ((0, 2), (1, 0))
    ]
    found = [batches_hash(itertools.chain(*shares)) for shares in zip(*loaders, strict=True)]
    assert found == expected[5:]


def test_a_stage_in_the_middle_can_be_replaced_or_inserted_anywhere(manifest):
    def only_first_shards(corpus):
        shards = corpus.manifest.shards[:3]
        smaller = corpus.manifest.create(corpus.manifest.directory, corpus.manifest.tokenizer, list(shards))
        return dataclasses.replace(corpus, manifest=smaller)

    shards, documents, pack = token_stages(manifest, sequence_length=LENGTH, seed=3)
    stream = compose([shards, only_first_shards, documents, pack])
    assert stream.samples_per_epoch == -(-(sum(s.tokens for s in manifest.shards[:3]) - 1) // LENGTH)


def test_a_stage_that_iterates_before_packing_is_refused_by_name(manifest):
    shards, documents, pack = token_stages(manifest, sequence_length=LENGTH, seed=3)
    pipeline = webdataset.DataPipeline(shards, documents, webdataset.map(lambda sample: sample), pack)
    with pytest.raises(InputError, match=r"stage pack was given a \w*generator\w*: every stage before packing"):
        next(iter(pipeline))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda document: document.tokens[1:], "broken: document part-.*as many ids as it is given"),
        (lambda document: document.tokens + 5000, r"broken: document part-.*outside \[0, 5000\)"),
        (lambda document: document.tokens / 2, "broken: document part-.*float64"),
    ],
    ids=["shorter", "unknown ids", "no ids"],
)
def test_a_stage_that_breaks_the_rule_stops_the_run_by_name(manifest, function, message):
    stream = build_stream(manifest, sequence_length=LENGTH, seed=3, document_stages=[DocumentStage("broken", function)])
    with pytest.raises(InputError, match=message):
        stream.sample(0)


def test_stages_and_filters_are_named_as_module_and_object():
    here = __name__
    sys.modules.setdefault(here, sys.modules[__name__])
    assert load_document_stage(f"{here}:masked").function is masked
    assert load_filter(f"{here}:german") is german
    assert isinstance(load_filter('{"scores": "a"}'), ScoreFilter)
    for name in ("no.such.module:f", f"{here}:absent", "masked"):
        with pytest.raises(InputError, match=f"document_stages={name}: "):
            load_document_stage(name)


def test_the_trainer_s_settings_make_the_same_stream(manifest):
    from megatron_tn.config import DataConfig, TrainConfig
    from megatron_tn.data import open_stream

    counting.count(manifest, german)
    data = DataConfig(
        manifest=f"{manifest.directory}/manifest.json",
        sequence_length=LENGTH,
        shuffle_window=3,
        filter=f"{__name__}:german",
        document_stages=[f"{__name__}:masked"],
        max_damaged=7,
    )
    stream = open_stream(dataclasses.replace(TrainConfig(), seed=3, data=data))
    stage = DocumentStage(f"{__name__}:masked", masked)
    wanted = build_stream(
        manifest, sequence_length=LENGTH, seed=3, window=3, filter=german, document_stages=[stage], max_damaged=7
    )
    assert stream.stream_hash == wanted.stream_hash
    assert stream.max_damaged == 7
    assert batches_hash([everything(stream)]) == batches_hash([everything(wanted)])


def test_a_filter_of_one_s_own_is_counted_and_kept_to(manifest):
    (manifest.directory / counts_file(manifest, german)).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"not counted yet; run data_pipeline\.stream\.count\.count"):
        build_stream(manifest, sequence_length=LENGTH, seed=3, filter=german)
    counts = counting.count(manifest, german)
    stream = build_stream(manifest, sequence_length=LENGTH, seed=3, filter=german)
    documents = [d.tokens for d in read_documents(manifest) if d.metadata["language"] == "de"]
    assert counts.documents.sum() == len(documents) > 0
    fed = everything(stream)
    assert int((fed.targets == EOS).sum()) == len(documents)
    assert int((fed.targets == BOS).sum()) == len(documents) - 1
    with pytest.raises(InputError, match="filtered already"):
        compose([stages_of.shards(manifest), stages_of.keep(german), stages_of.keep(german)])


def test_target_tokens_are_what_counts(manifest):
    for isolate in (False, True):
        batch = build_stream(manifest, sequence_length=LENGTH, seed=3, isolate_documents=isolate).batch(range(30))
        assert batch.target_tokens == int((batch.targets != -100).sum())
        assert torch.is_tensor(batch.tokens)


def ends(document):
    raise StopIteration


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stage_that_raises_stop_iteration_does_not_end_the_data(manifest, workers):
    stage = DocumentStage("ends", ends)
    stream = build_stream(manifest, sequence_length=LENGTH, seed=0, document_stages=[stage])
    loader = BatchLoader(stream, lambda step: (step * 4, 4), micro_batch=4, workers=workers)
    with loader, pytest.raises(RuntimeError, match="raised StopIteration"):
        next(iter(loader))


def test_only_its_parent_ends_a_reader_process(manifest, monkeypatch):
    def told_at_once(worker):
        os.kill(os.getpid(), signal.SIGTERM)  # the stop signal of a job whose reader has just been forked
        protect(worker)

    protect = loader_module._end_by_parent_alone
    monkeypatch.setattr(loader_module, "_end_by_parent_alone", told_at_once)
    gc.collect()  # the error of a test before this one may still hold that test's reader
    others = set(multiprocessing.active_children())  # worlds of ranks that tests share
    stream = build_stream(manifest, sequence_length=LENGTH, seed=0)
    with BatchLoader(stream, lambda step: (step * 4, 4), micro_batch=4, workers=1) as loader:
        steps = iter(loader)
        next(steps)
        (reader,) = set(multiprocessing.active_children()) - others
        subprocess.run(["kill", "-TERM", str(reader.pid)], check=True)
        for _ in range(20):
            next(steps)
        assert reader.is_alive()
    reader.join(10)
    assert not reader.is_alive()


def read_for_a_trainer(pipe) -> None:
    """A trainer whose reader has another process for its parent, as a fork server's children have."""
    reader = multiprocessing.get_context("fork").Process(target=be_a_reader, args=(pipe,))
    reader.start()
    os.kill(os.getpid(), signal.SIGKILL)


def be_a_reader(pipe) -> None:
    _end_by_parent_alone(0)
    pipe.send(os.getpid())
    time.sleep(1000)


def test_a_reader_process_ends_with_a_killed_trainer():
    here, there = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("fork").Process(target=read_for_a_trainer, args=(there,))
    trainer.start()
    trainer.join(10)
    there.close()
    reader = here.recv()
    assert here.poll(10)  # its end of the pipe is closed
    with pytest.raises(EOFError):
        here.recv()
    assert reader != trainer.pid
