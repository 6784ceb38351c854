"""The benchmarks run, on small figures: what they measure is not undone by a change elsewhere."""

import functools

from data_pipeline.stream import bench


def test_reader(tmp_path, monkeypatch):
    small = functools.partial(bench.write_shards)
    monkeypatch.setattr(bench, "write_shards", lambda folder, **_: small(folder, shards=2, shard_tokens=60_000))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    figures = bench.reader(tmp_path)
    assert figures["tokens"] == 2 * (60_000 // bench.DOCUMENT) * bench.DOCUMENT
    assert min(figures[name] for name in ("batches", "batches_isolated", "webdataset_documents")) > 0


def test_start(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHARD_TOKENS", 67_000)
    monkeypatch.setattr(bench, "prepare", bench._prepare)
    figures = bench.start(tmp_path, 30)
    assert (figures["shards"], figures["tokens"]) == (30, 30 * 67_000)
    assert 0 <= figures["of_which_first_batch"] <= figures["seconds"] < 60


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert bench.main(["reader", "--folder", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
