"""The files of a run: whole or absent, one run at a time, and written as far as a full disk allows."""

import errno
import fcntl
import json
import multiprocessing
import os
import time

import pytest

from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.training import run_folder
from megatron_tn.training.curve import draw
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import Ledger, TrainingState
from megatron_tn.training.watchdog.signs import Sign, file_of
from tests.helpers.training import fork_ranks


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


NOTE = {"from": 7, "to": 4, "skip": [7], "by": "guard", "reason": "a spike"}


def test_a_ledger_is_taken_over_once_however_often_it_is_read(folder):
    folder.write_ledger(Ledger([7], [NOTE]))
    state = TrainingState(step=4, skip=[2])
    for _ in range(2):
        state.add_ledger(folder.ledger())
    assert state.ledger == Ledger([2, 7], [NOTE])


@pytest.mark.parametrize("content", ["{", "[]", '{"skip": ["x"]}', '{"skips": []}'])
def test_a_damaged_ledger_is_an_error_and_not_an_empty_one(folder, content):
    folder.ledger_file.write_text(content)
    with pytest.raises(ConfigError, match=r"move .*ledger.json away"):
        folder.ledger()


def test_a_full_disk_takes_a_status_in_place_of_the_one_before(folder, monkeypatch):
    folder.write_status("running", 3)
    monkeypatch.setattr(run_folder, "_replace", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    folder.write_status("failed", 5, error="é" * 5000)
    status = json.loads(folder.status_file.read_text())
    assert (status["state"], status["step"]) == ("failed", 5)
    assert folder.status_file.stat().st_size <= 4096
    folder.write_status("finished", 6)
    assert "error" not in folder.status()


def test_a_full_disk_names_the_file_that_it_does_not_take(folder, monkeypatch):
    def no_room(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")  # as write and fsync do: without a name

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=r"No space left on device: .*ledger\.json"):
        folder.write_ledger(Ledger())


def test_a_rank_that_speaks_for_rank_0_keeps_the_larger_step(folder):
    folder.mark_failed(9, "no run has written here")
    assert not folder.status_file.exists()
    folder.write_status("running", 8)
    folder.mark_failed(5, "rank 0 hangs")
    assert {key: folder.status()[key] for key in ("state", "step", "error")} == {
        "state": "failed",
        "step": 8,
        "error": "rank 0 hangs",
    }


def hold(path: str, holds) -> None:
    folder = RunFolder(path)
    assert folder.claim() == ""
    holds.set()
    time.sleep(100)


def test_one_process_at_a_time_has_the_folder_whatever_becomes_of_it(folder):
    holds = multiprocessing.get_context("forkserver").Event()
    (first,) = fork_ranks(1, hold, str(folder), holds)
    try:
        assert holds.wait(60)
        assert f"process {first.pid})" in folder.claim()
    finally:
        first.kill()
        first.join()
    assert folder.claim() == ""  # the kernel releases what a killed process held
    folder.release()


@pytest.mark.parametrize("when", ["open", "lockf"])
def test_a_lock_is_of_the_file_that_others_find_while_a_refused_start_leaves(tmp_path, monkeypatch, when):
    """A start that is refused removes the new folder: between this start's mkdir and open, or its open and lock."""
    one, other = RunFolder(tmp_path / "new/run"), RunFolder(tmp_path / "new/run")
    module, left = (os, []) if when == "open" else (fcntl, [])
    real = getattr(module, when)

    def leaving(*args):
        if not left:
            left.append(other.path)
            other._made = [other.path / "run.lock", other.path, other.path.parent]
            other.put_back()
        return real(*args)

    monkeypatch.setattr(module, when, leaving)
    assert one.claim() == ""
    assert left
    assert os.path.samestat(os.fstat(one._lock), (one.path / "run.lock").stat())
    one.put_back()
    one.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_a_link_to_somebody_elses_file_is_not_opened(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder.path / "run.lock").symlink_to(victim)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        folder.claim()
    assert victim.read_text() == "precious"


def test_checkpoints_are_kept_aside_under_names_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(run_folder.time, "time", lambda: 1000.0)
    kept = []
    for _ in range(2):
        checkpoint = folder.checkpoints / "step_00000008"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        assert folder.saved() == {8: checkpoint}
        kept.append(folder.keep_aside(checkpoint, "rewound").name)
        assert folder.saved() == {}
    assert kept == ["step_00000008.rewound-1000", "step_00000008.rewound-1000-2"]


def test_a_step_is_found_under_the_name_that_a_kill_inside_publication_left(folder):
    for name in ("step_00000007", "step_00000008", "step_00000008-again"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "manifest.json").write_text("{}")
    assert {step: path.name for step, path in folder.saved().items()} == {
        7: "step_00000007",
        8: "step_00000008-again",
    }


def test_a_tokenizer_that_is_there_takes_no_room_on_a_full_disk(folder, tmp_path, monkeypatch):
    given = tmp_path / "given.json"
    for content in ("{}", "[]"):
        given.write_text(content)
        folder.keep_tokenizer(given)
        assert folder.tokenizer.read_text() == content
    monkeypatch.setattr(run_folder, "replacing", lambda *_: pytest.fail("it is written"))
    folder.keep_tokenizer(given)


def test_no_link_in_the_place_of_a_temporary_file_is_followed(folder, tmp_path):
    """In a folder that others may write to, a link would have the run overwrite a file of its owner."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    replaced = ("config.json", "status.json", "job.json", "ledger.json", "log.jsonl", "tokenizer.json", "loss.png")
    links = [*(f"{name}.tmp" for name in replaced), "tokenizer.json", "loss.png", "tracebacks/rank_00000.txt"]
    for name in links:
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).symlink_to(victim)
    sign = Sign(rank=0, host="here", pid=1)
    file_of(tmp_path, 0).symlink_to(victim)
    folder.freeze(TrainConfig(), "7")
    folder.write_status("running", 1)
    folder.write_ledger(Ledger())
    folder.write_traceback(0, ValueError("here"))
    folder.journal.path.write_text('{"step": 9}\n')
    folder.journal.set_aside_after(3)
    folder.keep_tokenizer(victim)
    folder.journal.append([{"step": 1, "tokens": 1, "loss": 2.0}])
    assert draw({"run": folder}, folder.path / "loss.png")
    sign.write(tmp_path)
    assert victim.read_text() == "mine"
    assert folder.tokenizer.read_text() == "mine"
    assert not folder.tokenizer.is_symlink()
    assert folder.status()["state"] == "running"
    assert folder.frozen_config() == TrainConfig()
    assert "here" in (folder.path / "tracebacks/rank_00000.txt").read_text()
