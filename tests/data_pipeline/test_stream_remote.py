"""Shards on a remote file system: the same batches, a cache that stays within its bound, retries, and damage named."""

import errno
import fcntl
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.selfclean.score import score_shards
from data_pipeline.shards import read_documents, verify
from data_pipeline.shards.cache import EVICTED, CacheFull, files_of
from data_pipeline.shards.remote import Remote
from data_pipeline.shards.scores import load_scores, save_scores
from data_pipeline.stream import BatchLoader, InputError, Manifest, ScoreFilter, build_stream
from data_pipeline.stream import count as counting
from data_pipeline.stream.score_filter import counts_file
from tests.data_pipeline.shard_factory import batches_hash, make_shards, stop_at_the_fourth_shard
from tests.data_pipeline.test_selfclean import LengthScorer


@pytest.fixture
def local(tmp_path):
    return make_shards(tmp_path / "local", documents=160, shard_tokens=300)


@pytest.fixture
def url(local, tmp_path):
    memory, root = fsspec.filesystem("memory"), f"/shards-{tmp_path.name}"
    for path in local.directory.iterdir():
        memory.pipe(f"{root}/{path.name}", path.read_bytes())
    return f"memory:/{root}"


def load(url, tmp_path, **options):
    return Manifest.load(f"{url}/manifest.json", cache=tmp_path / "cache", **options)


def make_stream(manifest):
    return build_stream(manifest, sequence_length=16, seed=2)


def cached_bytes(tmp_path):
    """What shards and indexes take at one moment: while the lock is held, nothing is taken away."""
    with (tmp_path / "cache" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(stat.st_size for path, stat in files_of(tmp_path / "cache") if path.suffix in (".tar", ".npy"))


def test_the_same_stream_as_from_local_disk(local, url, tmp_path):
    far, near = make_stream(load(url, tmp_path)), make_stream(local)
    assert far.stream_hash == near.stream_hash
    indices = range(near.samples_per_epoch)
    assert batches_hash([far.batch(indices)]) == batches_hash([near.batch(indices)])
    assert [d.metadata for d in read_documents(load(url, tmp_path))] == [d.metadata for d in read_documents(local)]


def test_the_cache_stays_within_its_bound_and_nothing_is_lost(local, url, tmp_path):
    bound = 5 * max(shard.size for shard in local.shards)
    assert sum(shard.size for shard in local.shards) > 2 * bound
    stream, largest = make_stream(load(url, tmp_path, cache_bytes=bound)), 0
    for index in range(stream.samples_per_epoch):
        assert stream.sample(index).damage is None
        largest = max(largest, cached_bytes(tmp_path))
    assert 0 < largest <= bound
    assert list((tmp_path / "cache").glob("*/manifest.json"))


def test_what_comes_next_is_there_before_it_is_asked_for(url, tmp_path):
    stream = make_stream(load(url, tmp_path))
    stream.sample(0)
    stream.manifest.remote._pool.shutdown(wait=True)
    here = list((tmp_path / "cache" / "content").glob("*.tar"))
    assert len(here) >= stream.window + 1


def test_a_cache_too_small_to_read_ahead_is_refused(local, url, tmp_path):
    least = 4 * max(shard.size for shard in local.shards)
    with pytest.raises(InputError, match=f"cache_bytes=1000 is below {least}"):
        load(url, tmp_path, cache_bytes=1000)


class Flaky:
    """A file system whose downloads of shards fail or are cut short so many times."""

    def __init__(self, inner, failures, cut):
        self.inner, self.left, self.cut = inner, failures, cut

    def get_file(self, path, target, callback):
        failing = self.left and path.endswith(".tar")
        self.left -= bool(failing)
        if failing and not self.cut:
            raise ConnectionError("connection reset")
        Path(target).write_bytes(self.inner.cat_file(path)[: -700 if failing else None])


@pytest.mark.parametrize("cut", [False, True], ids=["refused", "cut short"])
@pytest.mark.parametrize(("failures", "whole"), [(2, True), (3, False)])
def test_retries_with_backoff_and_then_damage(local, url, tmp_path, monkeypatch, cut, failures, whole):
    manifest = load(url, tmp_path)
    waits = []
    manifest.remote.attempts, manifest.remote.first_wait = 3, 1.0
    manifest.remote.prefetch = lambda wanted: None
    flaky = Flaky(fsspec.filesystem("memory"), failures, cut)
    monkeypatch.setattr(Remote, "_filesystem", lambda self: (flaky, self.url.removeprefix("memory:/")))
    monkeypatch.setattr("time.sleep", waits.append)
    sample = make_stream(manifest).sample(0)
    assert (sample.damage is None) == whole
    assert 0.5 <= waits[0] <= 1.0 <= waits[1] <= 2.0
    if not whole:
        assert "3 attempts" in sample.damage.reason
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def test_an_altered_shard_is_damage_and_never_data(local, url, tmp_path, monkeypatch):
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shard = local.shards[0]
    data = bytearray(memory.cat_file(f"{root}/{shard.name}"))
    data[600] ^= 1
    memory.pipe(f"{root}/{shard.name}", bytes(data))
    stream = make_stream(load(url, tmp_path))
    reasons = {s.damage.reason for i in range(stream.samples_per_epoch) if (s := stream.sample(i)).damage}
    assert reasons
    assert all("sha256 is not the manifest's" in reason for reason in reasons)


def test_a_stream_moves_to_reader_processes(url, tmp_path):
    stream = make_stream(load(url, tmp_path))
    stream.sample(0)
    again = pickle.loads(pickle.dumps(stream))
    assert again.sample(3).tokens.equal(stream.sample(3).tokens)
    with BatchLoader(stream, lambda step: (step * 4, 4), micro_batch=4, workers=0) as loader:
        assert next(iter(loader))[0].indices == (0, 1, 2, 3)


def test_missing_and_truncated_remote_shards_are_named_at_load(local, url, tmp_path):
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    memory.rm(f"{root}/{local.shards[1].name}")
    memory.pipe(f"{root}/{local.shards[2].name}", b"short")
    with pytest.raises(InputError) as caught:
        load(url, tmp_path)
    assert f"shard {local.shards[1].name}: it or its index is missing" in str(caught.value)
    assert f"shard {local.shards[2].name}: truncated: 5 bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat manifest.json", "pipe: is no file system"),
        ("pipe://x/manifest.json", "pipe: is no file system"),
        ("memory://nowhere/manifest.json", "not there"),
    ],
)
def test_a_url_that_cannot_be_opened_is_refused_by_name(tmp_path, path, message):
    with pytest.raises(InputError, match=message):
        Manifest.load(path, cache=tmp_path / "cache")


BAND = ScoreFilter(scores="s", default=(0.3, None))


@pytest.fixture
def scored(local, url):
    """The remote shards, with scores."""
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    for shard in local.shards:
        path = save_scores(local.directory, shard, "s", np.random.default_rng(3).random((shard.documents, 2)))
        memory.pipe(f"{root}/{path.name}", path.read_bytes())
    return root


def test_counts_are_cached_beside_a_remote_manifest_for_every_machine(local, url, scored, tmp_path):
    counting.count(load(url, tmp_path), BAND)
    elsewhere = Manifest.load(f"{url}/manifest.json", cache=tmp_path / "elsewhere")
    stream = build_stream(elsewhere, sequence_length=16, seed=2, filter=BAND)
    counting.count(local, BAND)
    assert stream.stream_hash == build_stream(local, sequence_length=16, seed=2, filter=BAND).stream_hash
    assert not [d for i in range(stream.samples_per_epoch) for d in stream.read([i]).damaged]


def test_scores_lie_beside_remote_shards_for_every_machine(url, tmp_path):
    here, elsewhere = (Manifest.load(f"{url}/manifest.json", cache=tmp_path / name) for name in ("here", "elsewhere"))
    assert score_shards(here, LengthScorer(), "s", rank=0, size=2) > 0
    assert score_shards(elsewhere, LengthScorer(), "s", rank=1, size=2) > 0
    assert score_shards(elsewhere, unasked := LengthScorer(), "s") == unasked.asked == 0
    for shard in here.shards:
        assert load_scores(here.read, shard, "s")[1] == load_scores(elsewhere.read, shard, "s")[1]
    assert counting.count(load(url, tmp_path), BAND).documents.sum() == here.totals.documents


def test_a_killed_count_of_remote_shards_goes_on_where_it_was(local, url, scored, tmp_path, monkeypatch):
    counted = stop_at_the_fourth_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        counting.count(load(url, tmp_path), BAND)
    counts = counting.count(load(url, tmp_path), BAND)
    assert counted[4:] == [shard.name for shard in local.shards[3:]]
    assert counts.content_hash == counting.count(local, BAND).content_hash


def test_scores_that_were_made_again_are_not_taken_from_the_cache(local, url, scored, tmp_path):
    memory, shard = fsspec.filesystem("memory"), local.shards[0]
    counting.count(load(url, tmp_path), BAND)
    stream = build_stream(load(url, tmp_path), sequence_length=16, seed=2, filter=BAND)
    stream.read(range(stream.samples_per_epoch))  # now the cache has the scores
    path = save_scores(local.directory, shard, "s", np.random.default_rng(4).random((shard.documents, 2)))
    memory.pipe(f"{scored}/{path.name}", path.read_bytes())
    name = counts_file(local, BAND)
    memory.rm(f"{scored}/{name}")
    next((tmp_path / "cache").glob(f"*/{name}")).unlink()
    other = Manifest.load(f"{url}/manifest.json", cache=tmp_path / "other")
    assert counting.count(other, BAND).content_hash == counting.count(local, BAND).content_hash
    again = build_stream(load(url, tmp_path), sequence_length=16, seed=2, filter=BAND)
    assert not again.read(range(again.samples_per_epoch)).damaged


def test_verify_reads_what_is_there_and_not_what_is_cached(local, url, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEGATRON_TN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    assert verify.main([f"{url}/manifest.json", "--workers=1"]) == 0  # memory:// is this process's own
    altered = bytearray(memory.cat_file(f"{root}/{local.shards[0].name}"))
    altered[600] ^= 1
    memory.pipe(f"{root}/{local.shards[0].name}", bytes(altered))
    memory.pipe(f"{root}/{local.shards[1].name}", b"short")
    memory.rm(f"{root}/{local.shards[2].name}")
    memory.pipe(f"{root}/stray.tar", b"")
    assert verify.main([f"{url}/manifest.json", "--workers=1"]) == 1
    found = capsys.readouterr().err
    for number, kind in enumerate(["altered", "truncated", "missing"]):
        assert f"shard {local.shards[number].name}: {kind}" in found
    assert "shard stray.tar: lies beside the manifest" in found
    assert len(found.splitlines()) == 4


@pytest.fixture
def small_disk(monkeypatch):
    """A disk that holds `bytes` of shards in one folder."""

    def install(folder, size):
        def get_file(filesystem, source, target, **options):
            data = filesystem.cat_file(source)
            used = sum(stat.st_size for path, stat in files_of(folder) if path.suffix in EVICTED)
            if used + len(data) > size:
                Path(target).write_bytes(data[:100])
                raise OSError(errno.ENOSPC, "No space left on device")
            Path(target).write_bytes(data)

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", get_file)

    monkeypatch.setattr("random.Random.uniform", lambda *_: 0.0)
    return install


def test_a_full_disk_takes_from_the_cache_and_loses_nothing(local, url, tmp_path, small_disk):
    expected = make_stream(local).batch(range(40))
    manifest = load(url, tmp_path)
    small_disk(tmp_path / "cache", 6 * max(shard.size for shard in local.shards))
    stream = make_stream(manifest)
    assert batches_hash([stream.batch(range(40))]) == batches_hash([expected])


def test_a_disk_that_stays_full_stops_the_run_and_is_no_damage(url, tmp_path, small_disk):
    manifest = load(url, tmp_path)
    small_disk(tmp_path / "cache", 10)
    stream = make_stream(manifest)
    with pytest.raises(CacheFull, match=r"cache .*: No space left on device, and nothing in it can be removed"):
        stream.batch(range(4))
    assert stream.state(0).skipped == ()


def test_a_cache_that_cannot_be_written_is_a_line_of_the_manifest(url, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^manifest={url}.*File exists: '{tmp_path}/file'"):
        Manifest.load(f"{url}/manifest.json", cache=tmp_path / "file")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match=f"^manifest: cache {tmp_path}/cache/.lock: Too many levels"):
        load(url, tmp_path)


def test_many_ranks_load_one_url_at_once(local, tmp_path):
    """Ranks of one node share a cache: none may take away the manifest that another is about to read."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: load(f"file://{local.directory}", tmp_path).content_hash, range(64)))
    assert set(found) == {local.content_hash}


def test_a_corpus_published_again_at_its_address_is_read_anew(url, tmp_path):
    """Other documents under the same names, in tar files of the same sizes: the cache has the old ones."""
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    old = load(url, tmp_path)
    before = make_stream(old).batch(range(20))
    other = make_shards(tmp_path / "again", documents=160, shard_tokens=300, seed=5)
    assert [shard.name for shard in other.shards][:3] == [shard.name for shard in old.shards][:3]
    assert {s.size for s in other.shards} & {s.size for s in old.shards}
    for path in other.directory.iterdir():
        memory.pipe(f"{root}/{path.name}", path.read_bytes())
    after = make_stream(load(url, tmp_path)).batch(range(20))
    assert not after.damaged
    assert batches_hash([after]) == batches_hash([make_stream(other).batch(range(20))]) != batches_hash([before])


def test_one_bound_holds_for_all_addresses_of_a_node(local, url, tmp_path):
    memory, root = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    other = make_shards(tmp_path / "second", documents=160, shard_tokens=300, seed=5)
    for path in other.directory.iterdir():
        memory.pipe(f"{root}-second/{path.name}", path.read_bytes())
    bound = 5 * max(shard.size for shard in (*local.shards, *other.shards))
    streams = [make_stream(load(place, tmp_path, cache_bytes=bound)) for place in (url, f"{url}-second")]
    largest = 0
    for index in range(20):
        assert not any(stream.sample(index).damage for stream in streams)
        largest = max(largest, cached_bytes(tmp_path))
    assert 0 < largest <= bound


def test_a_lock_file_that_is_a_link_is_refused(url, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        load(url, tmp_path)
    assert (tmp_path / "victim").read_text() == "kept"


def test_what_a_killed_download_left_takes_no_room(url, tmp_path):
    stream = make_stream(load(url, tmp_path))
    content = tmp_path / "cache" / "content"
    for suffix in ("room", "tmp"):
        (content / f".a.0123.{suffix}").write_bytes(bytes(100))
    assert stream.sample(0).damage is None
    assert not list(content.glob(".a.*"))
