"""Rounds of self-cleaning with the trainer and the scorer themselves."""

import json
import shutil
import subprocess
import sys

from data_pipeline.audit.samples import Samples
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream.score_filter import KeptCounts, ScoreFilter
from tests.helpers.training import SMALL, losses


def test_a_round_trains_scores_and_leaves_a_filter_that_training_reads(shards, tmp_path, forked_programs):
    shutil.copytree(shards.parent, tmp_path / "shards")
    manifest = tmp_path / "shards/manifest.json"
    train = [word for word in SMALL if word != "model=demo"]
    train += ["schedule.steps=3", "engine=local", "engine.precision=fp32"]
    words = [f"manifest={manifest}", f"output={tmp_path / 'out'}", "rounds=2", "evaluation_model=demo", "each=3"]
    words += ["quantiles.low=0.1", "quantiles.high=0.9", "quantiles.minimum=20", f"train={json.dumps(train)}"]
    command = [sys.executable, "-m", "data_pipeline.selfclean", *words]
    assert subprocess.run(command).returncode == 0
    there = Manifest.load(manifest)
    for number in (1, 2):
        folder = tmp_path / f"out/round_{number:02d}"
        assert list(losses(folder / "train")) == [1, 2, 3]
        found = ScoreFilter.load(str(folder / "filter.json"))
        assert found.scores.startswith(f"round{number}-")
        assert 0.7 < KeptCounts.load(there, found).documents.sum() / there.totals.documents < 1
        assert Samples.load(str(folder / "samples.jsonl")).entries
    second = json.loads((tmp_path / "out/round_02/train/config.json").read_text())
    assert second["data"]["filter"] == str(tmp_path / "out/round_01/filter.json")
