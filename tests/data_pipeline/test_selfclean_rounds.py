"""Rounds of self-cleaning with stand-ins for the trainer and the scorer: steps, resumption, thresholds, people."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from data_pipeline.audit.samples import Samples
from data_pipeline.selfclean.__main__ import main
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scores import load_scores
from data_pipeline.stream.score_filter import KeptCounts, ScoreFilter
from tests.data_pipeline.test_pipeline import ROOT
from tests.helpers.shards import make_text_shards

# Each notes its words in `log`; the scorer's scores grow with a document's length, and a file named `fail` stops it.
TRAINER = """
import pathlib, sys
with pathlib.Path(sys.argv[1]).open("a") as file:
    print("train", *sys.argv[2:], file=file)
"""
SCORER = """
import pathlib, sys
import numpy as np
from data_pipeline.shards.index import TOKENS
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import shard_index
from data_pipeline.shards.scores import save_scores
log = pathlib.Path(sys.argv[1])
with log.open("a") as file:
    print("score", *sys.argv[2:], file=file)
words = dict(word.split("=", 1) for word in sys.argv[2:])
manifest = Manifest.load(words["manifest"])
for number, shard in enumerate(manifest.shards):
    if number == 1 and (log.parent / "fail").exists():
        sys.exit(7)
    nats = shard_index(manifest, shard)[:, TOKENS] / 10 + np.arange(shard.documents) / 1000
    save_scores(manifest.directory, shard, words["name"], np.stack([nats, nats / 2], axis=1))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    make_text_shards(folder, documents=300)
    return folder


@pytest.fixture
def start(corpus, tmp_path):
    """Runs the command on a copy of the corpus; gives its exit code."""
    shutil.copytree(corpus, tmp_path / "shards")
    for name, text in (("trainer", TRAINER), ("scorer", SCORER)):
        (tmp_path / f"{name}.py").write_text(text)

    def run(*words: str) -> int:
        programs = [f"{n}=[{sys.executable},{tmp_path / n}.py,{tmp_path / 'log'}]" for n in ("trainer", "scorer")]
        paths = (f"manifest={tmp_path / 'shards/manifest.json'}", f"output={tmp_path / 'out'}")
        return main([*paths, *programs, "quantiles.low=0.1", "quantiles.high=0.9", "quantiles.minimum=50", *words])

    return run


def test_programs_get_hostile_paths_as_they_are_and_no_values_of_variables(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHARDS_TOKEN", "shards")
    name = "it's a,b [c] $(touch marker) =1"
    out, manifest = f"output={tmp_path / name}", f"manifest={tmp_path}/${{oc.env:SHARDS_TOKEN}}/manifest.json"
    words = tmp_path / "words"
    (tmp_path / "scorer.py").write_text(
        f"import json, sys; open({str(words)!r}, 'w').write(json.dumps(sys.argv[2:]))\n"
    )
    assert start(out, manifest) in (1, 2)  # there are no scores
    found = OverridesParser.create().parse_overrides(json.loads(words.read_text()))
    assert {one.key_or_group: one.value() for one in found}["checkpoint"] == f"{tmp_path / name}/round_01/train"
    assert json.loads(words.read_text())[1] == f"manifest='{tmp_path}/${{oc.env:SHARDS_TOKEN}}/manifest.json'"
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round 1: ")][-1]
    assert shlex.split(line)[2:][-3:] == json.loads(words.read_text())


def log(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_rounds(start, tmp_path, capsys):
    assert start("rounds=2", "evaluation_model=demo", "train=['schedule.steps=3']", "each=4") == 0
    first, second = tmp_path / "out/round_01", tmp_path / "out/round_02"
    ran = log(tmp_path)
    assert [line[0] for line in ran] == ["train", "score", "train", "score"]
    manifest = tmp_path / "shards/manifest.json"
    words = ["model=demo", f"data.manifest={manifest}", f"run_dir={first / 'train'}", "schedule.steps=3"]
    assert ran[0][1:] == words
    assert f"data.filter={first / 'filter.json'}" in ran[2]
    assert ran[1][3] != ran[3][3]  # scores of different names
    manifest = Manifest.load(manifest)
    filter = ScoreFilter.load(str(second / "filter.json"))
    scores = np.concatenate([load_scores(manifest.read, s, filter.scores)[0][:, 0] for s in manifest.shards])
    low, high = filter.band("test", "")
    wanted = ((scores >= np.float32(low)) & (scores <= np.float32(high))).sum()
    assert KeptCounts.load(manifest, filter).documents.sum() == wanted
    assert 0.75 * len(scores) <= wanted <= 0.85 * len(scores)
    report = json.loads((second / "report.json").read_text())
    assert report["kept_of"]["test"]["documents"] == [wanted, len(scores)]
    assert {s.verdict for s in Samples.load(str(first / "samples.jsonl")).entries} == {"keep", "drop"}
    assert f"data.filter={second / 'filter.json'}" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_ends_alike(start, tmp_path, capsys):
    assert start("rounds=1") == 0
    whole = files(tmp_path / "out")
    for path in (tmp_path / "out", *(tmp_path / "shards").glob("*scores.npy"), *(tmp_path / "shards").glob("kept*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "log").unlink()
    (tmp_path / "fail").touch()
    assert start("rounds=1") == 1
    assert "score ended with exit code 7" in capsys.readouterr().err
    (tmp_path / "fail").unlink()
    assert start("rounds=1") == 0
    assert [line[0] for line in log(tmp_path)] == ["train", "score", "score"]
    assert files(tmp_path / "out") == whole
    # A step is done when its file is there: take the last ones away, more each time.
    for name in ("report.json", "samples.jsonl", "filter.json"):
        (tmp_path / "out/round_01/report.json").unlink(missing_ok=True)
        (tmp_path / "out/round_01" / name).unlink(missing_ok=True)
        assert start("rounds=1") == 0
        assert files(tmp_path / "out") == whole
    assert len(log(tmp_path)) == 3


def test_what_a_killed_start_left_at_work_keeps_a_second_one_out(start, tmp_path, capsys):
    began = tmp_path / "began"
    (tmp_path / "trainer.py").write_text(f"import pathlib, sys; pathlib.Path({str(began)!r}).touch(); sys.stdin.read()")
    programs = [f"{n}=[{sys.executable},{tmp_path / n}.py,{tmp_path / 'log'}]" for n in ("trainer", "scorer")]
    words = [f"manifest={tmp_path / 'shards/manifest.json'}", f"output={tmp_path / 'out'}", *programs]
    command = [sys.executable, "-m", "data_pipeline.selfclean", *words]
    read, write = os.pipe()  # the trainer ends when its input does
    with subprocess.Popen(command, cwd=ROOT, stdin=read, stdout=subprocess.DEVNULL) as process:
        wait_until(began.exists)
        process.kill()
    os.close(read)
    assert main(words) == 2
    assert "or by the trainer of a killed one" in capsys.readouterr().err
    os.close(write)
    wait_until(lambda: main(words) == 0)


def wait_until(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def judge(samples: Path, verdict: str) -> None:
    with samples.with_name("samples.answers.jsonl").open("a") as file:
        for sample in Samples.load(str(samples)).entries:
            answer = {"sample": sample.id, "verdict": verdict, "auditor": "a", "time": "2026-01-01T00:00:00Z"}
            file.write(json.dumps(answer) + "\n")


@pytest.mark.parametrize(
    ("verdict", "low", "high"),
    [("drop", 0.15, 0.85), ("keep", 0.1 / 1.5, 1 - 0.1 / 1.5), ("unsure", 0.1, 0.9)],
)
def test_people_move_the_next_quantiles(start, tmp_path, capsys, verdict, low, high):
    words = ("rounds=2", "audit=wait", "each=30")
    assert start(*words) == 0
    said = capsys.readouterr().out
    samples = tmp_path / "out/round_01/samples.jsonl"
    assert "are not judged yet" in said
    assert f"python -m data_pipeline.audit samples={samples}" in said
    assert not (tmp_path / "out/round_02").exists()
    judge(samples, verdict)
    assert start(*words) == 0
    found = json.loads((tmp_path / "out/round_02/report.json").read_text())["quantiles"]
    assert (found["low"], found["high"]) == pytest.approx((low, high))


def test_shards_that_take_no_scores_are_refused_before_a_model_is_trained(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "shards")
    assert start("each=0") == 2
    assert f"scores are written beside it, and {tmp_path / 'shards'} is read-only" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_other_settings_are_refused(start, capsys):
    assert start("rounds=1", "each=0") == 0
    assert start("rounds=1", "each=0", "quantiles.low=0.2") == 2
    assert "holds rounds with other settings: quantiles.low: 0.1 -> 0.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds=0"], "rounds"),
        (["quantiles.low=0.95"], "low=0.95 must be below high=0.9"),
        (["quantile.low=1"], "quantile"),
        (["manifest=nowhere.json"], "nowhere.json"),
        (["quantiles.sources={wiki: [0.1, 0.9]}"], "quantiles.sources=wiki: no such source; there are test"),
    ],
    ids=lambda p: p[0] if isinstance(p, list) else "",
)
def test_bad_input_is_named(start, capsys, words, message):
    assert start("each=0", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
