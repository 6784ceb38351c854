"""Which settings a start runs, and whose."""

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_tn.config import OptimConfig, TrainConfig, save
from megatron_tn.training.freeze import goes_on, settings_of_this_start
from megatron_tn.training.run_folder import SUBMITTED, RunFolder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv(SUBMITTED, raising=False)
    return RunFolder(tmp_path)


def configs(folder: RunFolder) -> tuple[TrainConfig, TrainConfig]:
    """A config as it was at the start, and as someone would have it now."""
    old = TrainConfig(run_dir=str(folder))
    return old, dataclasses.replace(old, optim=OptimConfig(lr=0.5))


def requeue(monkeypatch, job: str, count: int = 1) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))


def test_a_requeued_job_runs_what_it_froze(folder, monkeypatch):
    old, new = configs(folder)
    folder.freeze(old, "17")
    requeue(monkeypatch, "17")
    config, notes = settings_of_this_start(new, folder)
    assert config == old
    assert "wins, because SLURM requeued this job" in notes[0]
    assert notes[1:] == ["optim.lr: 0.0003 -> 0.5"]


@pytest.mark.parametrize("frozen_by", ["17", None, "nobody"], ids=["another job", "a person", "an older release"])
def test_a_job_requeued_before_it_froze_its_settings_runs_its_own(folder, monkeypatch, frozen_by):
    old, new = configs(folder)
    folder.freeze(old, frozen_by)
    if frozen_by == "nobody":
        folder.job_file.unlink()
    requeue(monkeypatch, "18")
    config, notes = settings_of_this_start(new, folder)
    assert config == new
    assert "the new settings win" in notes[0]
    assert not goes_on(folder)


def test_a_death_while_settings_are_frozen_makes_no_old_ones_the_new_jobs(folder, monkeypatch):
    old, new = configs(folder)
    folder.freeze(old, "17")
    monkeypatch.setattr("megatron_tn.training.run_folder.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.freeze(new, "18")
    requeue(monkeypatch, "18")
    assert settings_of_this_start(new, folder)[0] == new


def test_the_folder_is_the_one_that_the_command_names_from_where_it_stands(folder, monkeypatch):
    old, _ = configs(folder)
    folder.freeze(dataclasses.replace(old, run_dir="runs/first"), "17")  # frozen from another working folder
    requeue(monkeypatch, "17")
    monkeypatch.chdir(folder.path.parent)
    relative = os.path.relpath(folder.path)
    config, notes = settings_of_this_start(dataclasses.replace(old, run_dir=relative), RunFolder(relative))
    assert (config.run_dir, notes) == (relative, [])


def test_a_job_goes_on_once_it_has_loaded_what_its_first_start_was_asked_for(folder, monkeypatch):
    old, _ = configs(folder)
    requeue(monkeypatch, "17")
    found = []
    for begin in (False, True, False):
        folder.freeze(old, "17")
        if begin:
            folder.mark_begun()
        found.append(goes_on(folder))
    assert found == [False, True, True]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not goes_on(folder)


def test_a_job_runs_what_was_frozen_when_it_was_submitted(folder, monkeypatch, tmp_path):
    yaml, submitted = configs(folder)  # as YAML files have it by the time the job starts; as it was submitted
    save(submitted, tmp_path / "submitted.json")
    monkeypatch.setenv(SUBMITTED, str(tmp_path / "submitted.json"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for restart in ("0", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        assert settings_of_this_start(yaml, folder) == (submitted, [])
    folder.freeze(yaml, "16")  # of an earlier job
    config, notes = settings_of_this_start(yaml, folder)
    assert config == submitted
    assert "those that the job was submitted with win" in notes[0]
    assert notes[1:] == ["optim.lr: 0.0003 -> 0.5"]
    folder.freeze(submitted, "17")
    assert settings_of_this_start(yaml, folder) == (submitted, [])


def test_a_person_gets_what_they_ask_for_and_is_told_the_difference(folder):
    old, new = configs(folder)
    folder.freeze(old, None)
    config, notes = settings_of_this_start(new, folder)
    assert config == new
    assert "the new settings win" in notes[0]
    assert settings_of_this_start(old, folder) == (old, [])


def test_the_first_start_says_nothing(folder):
    old, _ = configs(folder)
    assert settings_of_this_start(old, folder) == (old, [])
    assert list(Path(folder.path).iterdir()) == []
