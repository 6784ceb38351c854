"""Two runs, step by step: equal, unequal at a step that is named, and failed are told apart by the exit code."""

import subprocess

import pytest

from launch import compare_losses
from launch.compare_losses import compare, difference, main
from tests.helpers.training import ROOT, SMALL

STEPS = {step: {"loss": 4.0 - step, "grad_norm": 1.0} for step in (1, 2, 3)}


def changed(step: int, **values: float | None) -> dict:
    return STEPS | {step: STEPS[step] | values}


def test_steps_are_compared_in_order():
    assert compare(STEPS, STEPS, 0.0) == []
    (line,) = compare(STEPS, changed(2, loss=2.0 + 1e-12), 0.0)
    assert line.startswith("step 2: loss 2.0 and 2.000000000001, 5.0e-13 apart; 1 of 3 steps differ, and step 3 by 0.0")
    assert compare(STEPS, changed(2, loss=2.0 + 1e-12), 1e-12) == []
    (line,) = compare(STEPS, changed(3, grad_norm=None), 1.0)
    assert line.startswith("step 3: grad_norm 1.0 and None, inf apart")
    assert compare(changed(3, grad_norm=None), changed(3, grad_norm=None), 0.0) == []
    assert compare(STEPS, {1: STEPS[1]}, 0.0) == ["step 2 is missing from the second run: 3 and 1 steps"]
    assert compare({}, {}, 0.0) == ["neither run has a step"]
    assert difference(0.0, -0.0) == 0.0


@pytest.mark.parametrize(("bound", "code"), [("0", 1), ("1e-13", 1), ("1e-12", 0)])
def test_configs_are_compared_to_a_bound(monkeypatch, capsys, bound, code):
    asked = []

    def train(checkout, words, folder, processes):
        asked.append((checkout, words, processes))
        return changed(2, loss=2.0 + 1e-12) if "engine=zero3" in words else STEPS

    monkeypatch.setattr(compare_losses, "train", train)
    words = ["--configs", "engine=local", "parallel.tp=2 engine=zero3", "--bound", bound, "--processes", "2"]
    assert main([*words, "--", "model=demo"]) == code
    assert asked == [
        (ROOT, ["model=demo", "engine=local"], 2),
        (ROOT, ["model=demo", "parallel.tp=2", "engine=zero3"], 2),
    ]
    assert ("step 2: loss" in capsys.readouterr().out) == (code == 1)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the sources are no git checkout")
def test_a_commit_equals_itself_and_leaves_no_worktree(shards, capsys):
    words = [*SMALL, f"data.manifest={shards}", "schedule.steps=3", "engine=local"]
    assert main(["--commits", "HEAD", "HEAD", "--", *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == ["HEAD: 3 steps", "HEAD: 3 steps", "every step agrees bit for bit"]
    assert main(["--commits", "no-such-commit", "HEAD", "--", *words]) == 2
    assert "error: --commits no-such-commit: " in capsys.readouterr().err
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "checkout_" not in left


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, capsys):
    """By a stand-in for training."""
    (tmp_path / "megatron_tn").mkdir()
    (tmp_path / "megatron_tn/__init__.py").touch()
    (tmp_path / "megatron_tn/train.py").write_text("import os; os.write(2, b'the dog ate it'); os._exit(2)")
    monkeypatch.setattr(compare_losses, "ROOT", tmp_path)
    assert main(["--configs", "seed=0", "seed=1", "--", "model=demo"]) == 2
    said = capsys.readouterr().err
    assert "exit code 2 of -m megatron_tn.train" in said
    assert "the dog ate it" in said
    with pytest.raises(SystemExit) as ended:
        main(["--commits", "HEAD"])
    assert ended.value.code == 2
