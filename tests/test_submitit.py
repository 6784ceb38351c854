"""What a sweep with hydra/launcher=submitit_slurm is given; tests/slurm/test_submitit.py runs one."""

from __future__ import annotations

import os

import pytest

from megatron_tn.submitit import MOST, settings_for_submitit
from megatron_tn.train import main as train
from tests.helpers.training import call

CHOSEN = "hydra/launcher=submitit_slurm"


@pytest.fixture
def submitit(monkeypatch):
    """As if the extra were installed."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_a_job_may_time_out_and_is_signalled_as_the_trainer_listens(submitit):
    assert settings_for_submitit(["model=demo"]) == []
    assert "SUBMITIT_PREEMPT_SIGNAL" not in os.environ
    assert settings_for_submitit([CHOSEN, "model=demo"]) == [f"hydra.launcher.max_num_timeout={MOST}"]
    assert os.environ["SUBMITIT_PREEMPT_SIGNAL"] == "USR1"
    assert settings_for_submitit([CHOSEN, "hydra.launcher.max_num_timeout=3"]) == []
    assert settings_for_submitit(["hydra/launcher=submitit_local"]) == []


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(train, "--multirun", "seed=0,1", CHOSEN) == 2
    assert f"error: {CHOSEN} needs the extra submitit: pip install" in capsys.readouterr().err
