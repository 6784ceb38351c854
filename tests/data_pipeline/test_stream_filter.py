"""The self-cleaning filter in the stream: thresholds from config, scores from sidecars, counts from their cache."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.pool import process_pool
from data_pipeline.shards import read_documents
from data_pipeline.shards.reading import read_shard
from data_pipeline.shards.scores import save_scores, scores_file
from data_pipeline.stream import IGNORED, InputError, Manifest, ScoreFilter, build_stream
from data_pipeline.stream import count as counting
from data_pipeline.stream.score_filter import KeptCounts, counts_file
from tests.data_pipeline.shard_factory import batches_hash, make_shards, stop_at_the_fourth_shard
from tests.data_pipeline.test_pipeline import ROOT

BAND = ScoreFilter(scores="small", default=(0.2, 0.8))


def score(document):
    """A score in [0, 1] that follows from the document."""
    return float(np.float32(document.tokens.sum() % 997 / 997))


@pytest.fixture
def manifest(tmp_path):
    manifest = make_shards(tmp_path, documents=150, sources={"a": 0.5, "b": 0.3, "c": 0.2}, languages=("en", "de"))
    for shard in manifest.shards:
        values = np.array([score(document) for document in read_shard(manifest, shard)])
        save_scores(tmp_path, shard, "small", np.stack([values, values / 3], axis=1))
    return manifest


def make_stream(manifest, filter=BAND, **options):
    return build_stream(manifest, **{"sequence_length": 16, "seed": 4, "filter": filter, **options})


def targets_of_an_epoch(stream):
    targets = torch.cat([stream.sample(index).targets for index in range(stream.samples_per_epoch)])
    return targets[targets != IGNORED].numpy()


def test_the_stream_feeds_what_the_band_keeps_and_nothing_else(manifest):
    counting.count(manifest, BAND)
    kept = [document for document in read_documents(manifest) if 0.2 <= score(document) <= 0.8]
    tokens = np.concatenate([document.tokens for document in kept])
    fed = targets_of_an_epoch(make_stream(manifest))
    assert 0 < len(tokens) < manifest.totals.tokens
    missing = np.bincount(tokens, minlength=5000) - np.bincount(fed, minlength=5000)
    assert missing.sum() == 1  # the first token of the epoch
    assert (missing >= 0).all()


def test_a_shard_of_which_nothing_is_kept_is_passed_over(manifest):
    empty = manifest.shards[2]
    save_scores(manifest.directory, empty, "small", np.full((empty.documents, 2), 0.9))
    counts = counting.count(manifest, BAND)
    assert counts.tokens[2] == 0
    stream = make_stream(manifest, sequence_length=4000)
    assert len(targets_of_an_epoch(stream)) == counts.tokens.sum() - 1
    assert stream.damaged == 0


def test_bands_by_source_and_language(manifest):
    filter = ScoreFilter(
        scores="small", default=(0.9, None), bands={"a": (None, 0.5), "b/de": (0.4, 0.6), "*/en": (None, None)}
    )

    def kept(document):
        source, language = document.metadata["source"], document.metadata["language"]
        if source == "a":
            return score(document) <= 0.5
        if (source, language) == ("b", "de"):
            return 0.4 <= score(document) <= 0.6
        return language == "en" or score(document) >= 0.9

    counts = counting.count(manifest, filter)
    chosen = [document for document in read_documents(manifest) if kept(document)]
    assert counts.documents.sum() == len(chosen)
    assert counts.tokens.sum() == sum(len(document.tokens) for document in chosen)


def test_missing_counts_name_the_command_which_then_works(manifest, capsys):
    with pytest.raises(InputError) as caught:
        make_stream(manifest)
    command = str(caught.value).partition("; run ")[2]
    assert command.startswith("python -m data_pipeline.stream.count ")
    import shlex

    assert counting.main(shlex.split(command)[3:]) == 0
    assert f"of {manifest.totals.documents} documents" in capsys.readouterr().out
    assert make_stream(manifest).samples_per_epoch > 0


@pytest.mark.parametrize("torn", [b"", b'["part-00004", [1, 2'], ids=["between lines", "within a line"])
def test_a_killed_count_goes_on_where_it_was(manifest, torn, monkeypatch):
    expected = counting.count(manifest, BAND)
    path = manifest.directory / counts_file(manifest, BAND)
    path.unlink()
    counted = stop_at_the_fourth_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        counting.count(manifest, BAND)
    assert not path.exists()
    with path.with_suffix(".progress").open("ab") as notes:
        notes.write(torn)
    again = counting.count(manifest, BAND)
    assert again.content_hash == expected.content_hash
    assert counted[4:] == [shard.name for shard in manifest.shards[3:]]
    assert not path.with_suffix(".progress").exists()


def test_a_signal_to_a_worker_that_has_just_started_is_ignored(capfd):
    for _ in range(5):
        with process_pool(3, multiprocessing.get_context("fork")) as pool:
            waiting = [pool.submit(int) for _ in range(3)]
            for worker in list(pool._processes):
                os.kill(worker, signal.SIGINT)
            assert [each.result(60) for each in waiting] == [0, 0, 0]
    assert capfd.readouterr().err == ""


def test_an_interrupted_pool_leaves_no_thread_to_the_interpreters_exit():
    def interrupted() -> None:
        with process_pool(1, multiprocessing.get_context("fork")) as pool:
            begun = pool.submit(time.sleep, 0.5)
            while not begun.running():
                time.sleep(0.01)
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() == before


def test_an_interrupted_count_says_so_in_one_line_and_goes_on(tmp_path):
    """Ctrl-C reaches every process of the terminal."""
    manifest = make_shards(tmp_path, documents=150, shard_tokens=100)
    for shard in manifest.shards:
        save_scores(tmp_path, shard, "s", np.ones((shard.documents, 2)))
    assert len(manifest.shards) > 2 * counting.CHUNK
    index = tmp_path / manifest.shards[-1].index
    index.rename(tmp_path / "aside")
    os.mkfifo(index)  # who reads it waits for what is written below: the count is not done before the signal comes
    words = [str(tmp_path / "manifest.json"), '{"scores": "s", "default": [0, null]}', "--workers", "2"]
    command = [sys.executable, "-m", "data_pipeline.stream.count", *words]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        while process.poll() is None and not any(path.stat().st_size for path in tmp_path.glob("*.progress")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        feeding = threading.Thread(target=lambda: index.write_bytes((tmp_path / "aside").read_bytes()), daemon=True)
        feeding.start()  # a worker finishes what it has begun
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert (process.returncode, errors) == (130, "interrupted: run the same command again\n")
    (progress,) = tmp_path.glob("*.progress")
    assert 0 < len(progress.read_bytes().splitlines()) < len(manifest.shards)
    (tmp_path / "aside").rename(index)
    assert counting.main(words) == 0


def test_of_two_counts_at_once_the_second_waits_and_counts_nothing(manifest, monkeypatch):
    counted, work = [], counting.count_shard

    def slowly(*arguments):
        counted.append(arguments[-1].name)
        time.sleep(0.05)
        return work(*arguments)

    monkeypatch.setattr(counting, "count_shard", slowly)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: counting.count(manifest, BAND).content_hash, range(3)))
    assert len(set(results)) == 1
    assert counted == [shard.name for shard in manifest.shards]


@pytest.mark.parametrize("damage", [b"[" * 100_000 + b"\n", b'{"a": 1}\n', b'["part-0", [1, 2]]\n', b"\xff\n"])
def test_damaged_progress_is_counted_again(manifest, damage):
    path = manifest.directory / counts_file(manifest, BAND)
    path.with_suffix(".progress").write_bytes(damage)
    assert counting.count(manifest, BAND).content_hash
    assert not path.with_suffix(".progress").exists()


def test_counting_in_processes_is_the_same(manifest):
    assert counting.count(manifest, BAND, workers=2).content_hash == KeptCounts.load(manifest, BAND).content_hash
    path = manifest.directory / counts_file(manifest, BAND)
    before = path.read_bytes()
    path.unlink()
    counting.count(manifest, BAND)
    assert path.read_bytes() == before


def test_a_filter_that_keeps_all_changes_no_sample_and_names_another_stream(manifest):
    everything = ScoreFilter(scores="small")
    counting.count(manifest, everything)
    filtered, plain = make_stream(manifest, everything), make_stream(manifest, None)
    indices = range(plain.samples_per_epoch)
    assert batches_hash([filtered.batch(indices)]) == batches_hash([plain.batch(indices)])
    assert filtered.stream_hash != plain.stream_hash


def test_scores_that_changed_since_counting_are_damage_and_never_other_data(manifest):
    counting.count(manifest, BAND)
    before = make_stream(manifest)
    shard = manifest.shards[1]
    save_scores(manifest.directory, shard, "small", np.full((shard.documents, 2), 0.5))
    after = make_stream(manifest)
    assert after.stream_hash == before.stream_hash
    damaged = 0
    for index in range(before.samples_per_epoch):
        sample = after.sample(index)
        damaged += sample.damage is not None
        assert sample.damage or torch.equal(sample.tokens, before.sample(index).tokens)
        assert sample.damage is None or f"{counts_file(manifest, BAND)} was counted from" in sample.damage.reason
    assert damaged
    os.unlink(manifest.directory / counts_file(manifest, BAND))  # as the message says
    counting.count(manifest, BAND)
    again = make_stream(manifest)
    assert not again.batch(range(again.samples_per_epoch)).damaged


def test_a_document_without_a_score_is_named(manifest, capsys):
    shard = manifest.shards[2]
    values = np.full((shard.documents, 2), 0.5)
    values[1] = np.nan
    save_scores(manifest.directory, shard, "small", values)
    path = manifest.directory / "filter.yaml"
    path.write_text("scores: small\ndefault: [0.2, 0.8]\n")
    assert counting.main([str(manifest.directory / "manifest.json"), str(path)]) == 2
    assert f"shard {shard.name}: document 1 has no score" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [None, b"", b"x", pickle.dumps([1]), "float64", "short"], ids=["absent", "empty", "text", "pickle", 1, 2]
)
def test_a_bad_sidecar_is_refused_by_name(manifest, content):
    shard = manifest.shards[0]
    path = manifest.directory / scores_file(shard, "small")
    path.unlink()
    if content == "float64":
        np.save(path, np.zeros((shard.documents, 2)))
    elif content == "short":
        np.save(path, np.zeros((1, 2), np.float32))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=path.name):
        counting.count(manifest, BAND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/no/such.yaml", "/no/such.yaml: No such file"),
        ("{", "filter"),
        ('{"scores": "../x"}', "scores='../x'"),
        ('{"scores": "a", "measure": "bits"}', "measure='bits'"),
        ('{"scores": "a", "default": [2, 1]}', "low=2.0 is above high=1.0"),
        ('{"scores": "a", "default": [true, 3]}', "default.0='True': Input should be a valid number"),
        ('{"scores": "a", "treshold": 2}', "treshold"),
        (sys.executable, f"filter={sys.executable}: 'utf-8' codec can't decode"),
    ],
    ids=str,
)
def test_a_bad_filter_is_one_clear_line(manifest, text, message, capsys):
    assert counting.main([str(manifest.directory / "manifest.json"), text]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


def test_a_band_of_a_source_that_is_not_there_is_named(manifest, capsys):
    bands = dict.fromkeys((*manifest.sources, "a/en", "*/zh", "d", "d/en", "*"), (0.2, 0.8))
    chosen = ScoreFilter(scores="small", bands=bands)
    assert counting.main([str(manifest.directory / "manifest.json"), chosen.to_json()]) == 0
    known = ", ".join(manifest.sources)
    assert capsys.readouterr().err == f"warning: bands of *, d, d/en: no such source, there are {known}\n"


def test_a_filter_that_keeps_nothing_is_refused(manifest):
    counting.count(manifest, none := ScoreFilter(scores="small", default=(5, 6)))
    with pytest.raises(InputError, match="tokens=0 are kept"):
        make_stream(manifest, none)


def test_a_damaged_cache_names_the_command(manifest):
    counting.count(manifest, BAND)
    path = manifest.directory / counts_file(manifest, BAND)
    whole = json.loads(path.read_text())
    huge = whole | {"shards": [[10**30, *row[1:]] for row in whole["shards"]]}
    for content in ("{", "[]", "{}", '{"manifest": 3}', json.dumps(whole | {"shards": []}), json.dumps(huge)):
        path.write_text(content)
        with pytest.raises(InputError, match=r"data_pipeline\.stream\.count"):
            make_stream(manifest)


def test_isolation_bounds_follow_what_is_kept(manifest):
    counting.count(manifest, BAND)
    stream = make_stream(manifest, isolate_documents=True)
    most = max(len(stream.sample(index).document_starts) for index in range(stream.samples_per_epoch))
    assert most <= stream.max_documents
    assert Manifest.load(manifest.directory / "manifest.json").content_hash == manifest.content_hash


def test_the_filter_of_the_documentation_loads():
    conf = Path(__file__).resolve().parents[2] / "conf"
    assert ScoreFilter.load(str(conf / "score_filter.yaml")).default == (0.5, 6.0)
