"""Shards behind a web server that fails in every way a web server does."""

import contextlib
import http.server
import itertools
import os
import shutil
import threading
import time

import numpy as np
import pytest

from data_pipeline.shards import remote, verify
from data_pipeline.shards.scores import save_scores
from data_pipeline.stream import (
    DamageLimitError,
    InputError,
    Manifest,
    ScoreFilter,
    StreamState,
    build_stream,
)
from data_pipeline.stream import count as counting
from tests.data_pipeline.shard_factory import PAD, batches_hash, make_shards

pytest.importorskip("aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults`: for a file's name, what goes wrong with its next requests, in order."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked, self.sent = folder, {}, [], 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send_all(self, pieces):
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.wfile.write(piece)
                self.server.sent += len(piece)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        name = self.path.strip("/")
        self.server.asked.append(name)
        waiting = self.server.faults.get(name, [])
        fault = waiting.pop(0) if waiting and body else None
        path = self.server.folder / name
        if fault == "stalled":
            time.sleep(1.0)
        if fault == "reset":
            return self.connection.shutdown(2)
        if fault == "503" or not path.is_file():
            return self.send_error(503 if fault else 404)
        data = path.read_bytes()
        self.send_response(200)
        if fault == "endless":
            data = itertools.repeat(bytes(1 << 20), 64)
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "endless":
            self.close_connection = True
            return self.send_all(data)
        if body and fault == "slow":
            for at in range(0, len(data), 2000):
                self.wfile.write(data[at : at + 2000])
                time.sleep(0.02)
        elif body and fault == "drip":
            with contextlib.suppress(ConnectionError):
                for at in range(len(data)):
                    self.wfile.write(data[at : at + 1])
                    time.sleep(0.01)
        elif body:
            self.wfile.write(data[: len(data) // 2] if fault == "truncated" else data)
        if fault == "truncated":
            self.close_connection = True


@pytest.fixture
def local(tmp_path):
    return make_shards(tmp_path / "local", documents=160, shard_tokens=300)


@pytest.fixture
def server(local, monkeypatch):
    monkeypatch.setattr("random.Random.uniform", lambda *_: 0.001)  # of the waits between attempts
    with Server(local.directory) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def load(server, tmp_path, **options):
    return Manifest.load(f"{server.url}/manifest.json", cache=tmp_path / "cache", **options)


def make_stream(manifest, **options):
    return build_stream(manifest, sequence_length=16, seed=2, **options)


def everything(stream):
    return [stream.batch([index]) for index in range(stream.samples_per_epoch)]


def test_faults_that_pass_change_no_batch(local, server, tmp_path):
    expected = batches_hash(everything(make_stream(local)))
    kinds = itertools.cycle([["503"], ["reset"], ["truncated"], ["slow"], ["503", "reset", "truncated"]])
    names = [name for shard in local.shards for name in (shard.name, shard.index)]
    server.faults = {name: list(faults) for name, faults in zip(names, kinds, strict=False)}
    server.faults["manifest.json"] = ["503", "truncated"]
    stream = make_stream(load(server, tmp_path))
    assert batches_hash(everything(stream)) == expected
    assert stream.damaged == 0
    assert not any(server.faults.values())  # each fault was met
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def test_a_server_that_stalls_is_given_up_on_and_asked_again(local, server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "STALLED", 0.3)
    manifest = load(server, tmp_path)
    manifest.remote.prefetch = lambda wanted: None
    server.faults = {shard.name: ["stalled"] for shard in local.shards}
    assert make_stream(manifest).sample(0).damage is None
    assert max(server.asked.count(shard.name) for shard in local.shards) >= 2


def test_a_download_stops_at_the_manifest_s_size_and_below_the_least_rate(local, server, tmp_path, monkeypatch):
    manifest = load(server, tmp_path)
    manifest.remote.prefetch = lambda wanted: None
    monkeypatch.setattr(remote, "STALLED", 0.3)
    shard, slow = local.shards[:2]
    server.faults = {shard.name: ["endless"] * 8, slow.name: ["drip"] * 8}
    with pytest.raises(OSError, match=f"more than {shard.size} bytes came: stopped"):
        manifest.open(shard.name, size=shard.size, sha256=shard.sha256)
    assert server.sent < 8 * 32 * 2**20  # half of what was on offer
    with pytest.raises(OSError, match="below 10000 bytes/s: stopped"):
        manifest.open(slow.name, size=slow.size, sha256=slow.sha256)
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def test_an_unavailable_server_is_not_taken_for_a_missing_file(server, tmp_path):
    server.faults["manifest.json"] = ["503"] * 8
    with pytest.raises(InputError, match="8 attempts: 503"):
        load(server, tmp_path)
    asked = len(server.asked)
    with pytest.raises(InputError, match="not there"):
        Manifest.load(f"{server.url}/other.json", cache=tmp_path / "cache")
    assert len(server.asked) == asked + 1


def test_missing_and_truncated_shards_are_named_at_load(local, server, tmp_path):
    (local.directory / local.shards[1].name).unlink()
    os.truncate(local.directory / local.shards[2].name, 1024)
    with pytest.raises(InputError) as caught:
        load(server, tmp_path)
    assert f"shard {local.shards[1].name}: it or its index is missing" in str(caught.value)
    assert f"shard {local.shards[2].name}: truncated: 1024 bytes" in str(caught.value)


@pytest.mark.parametrize("damage", ["altered", "gone", "503 for ever"])
def test_a_shard_that_goes_bad_in_mid_run_is_padding_counted_and_in_the_ledger(local, server, tmp_path, damage):
    expected = everything(make_stream(local))
    manifest = load(server, tmp_path)
    manifest.remote.prefetch = lambda wanted: None
    stream = make_stream(manifest)
    first = stream.batch(range(3))
    bad = next(shard for shard in local.shards if not manifest.remote.place(shard.name, shard.sha256).exists())
    path = local.directory / bad.name
    shutil.copy(path, tmp_path / "good.tar")
    if damage == "altered":
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    elif damage == "gone":
        path.unlink()
    else:
        server.faults[bad.name] = ["503"] * 10_000
    rest = [stream.batch([index]) for index in range(3, stream.samples_per_epoch)]
    assert not first.damaged
    lost = {damage.index for batch in rest for damage in batch.damaged}
    assert stream.damaged == len(lost) > 0
    assert {index for index in range(len(expected)) if index in stream.ledger} == lost
    for batch in rest:
        (index,) = batch.indices
        assert (batch.tokens == PAD).all() if index in lost else batch.tokens.equal(expected[index].tokens)
    with pytest.raises(DamageLimitError, match=f"max_damaged=0; the last: shard {bad.name}"):
        everything(make_stream(manifest, max_damaged=0))
    # Repaired, the resumed run still feeds what the ledger says.
    shutil.copy(tmp_path / "good.tar", path)
    server.faults.clear()
    again = make_stream(manifest)
    again.restore(StreamState.from_json(stream.state(5).to_json()))
    assert batches_hash(everything(again)) == batches_hash([stream.batch(range(3)), *rest])
    assert again.damaged == 0


def test_counting_and_verifying_what_cannot_be_written_to(local, server, tmp_path, capsys, monkeypatch):
    for shard in local.shards:
        save_scores(local.directory, shard, "s", np.random.default_rng(3).random((shard.documents, 2)))
    band = ScoreFilter(scores="s", default=(0.3, None))
    manifest = load(server, tmp_path)
    with pytest.raises(InputError, match=r"not counted yet; run python -m data_pipeline\.stream\.count http://127"):
        make_stream(manifest, filter=band)
    with pytest.raises(InputError, match=r"cannot be written: .*with --local that is enough"):
        counting.count(manifest, band)
    monkeypatch.setenv("MEGATRON_TN_CACHE", str(tmp_path / "other"))
    assert counting.main([f"{server.url}/manifest.json", band.to_json(), "--local", "--workers", "2"]) == 0
    stream = make_stream(Manifest.load(f"{server.url}/manifest.json"), filter=band)
    assert verify.main([f"{server.url}/manifest.json", "--workers=1"]) == 0
    path = local.directory / local.shards[1].name
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)  # the cache still has the good one, which is not what is asked
    assert verify.main([f"{server.url}/manifest.json", "--workers=1"]) == 1
    said = capsys.readouterr()
    assert f"of {local.totals.documents} documents" in said.out
    assert f"shard {local.shards[1].name}: altered" in said.err
    near = counting.count(local, band)
    assert stream.corpus.counts.content_hash == near.content_hash
    assert stream.stream_hash == make_stream(local, filter=band).stream_hash
