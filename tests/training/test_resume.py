"""Where a run goes on: chosen by rank 0, the same for all ranks."""

import dataclasses
import errno
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, checkpoint_name, whole_checkpoints
from megatron_tn.config import CheckpointConfig, ConfigError, TrainConfig
from megatron_tn.training import resume
from megatron_tn.training.resume import (
    Start,
    agree_on,
    agree_on_files,
    agree_on_settings,
    choose_start,
    leave_later_behind,
)
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import Ledger
from tests.helpers.ranks import run_ranks, run_shared


def save(folder: RunFolder, step: int, name: str = "", damaged: bool = False) -> Path:
    """A checkpoint without tensors."""
    path = folder.checkpoints / (name or checkpoint_name(step))
    path.mkdir(parents=True)
    config = {"model": {}, "engine": {}, "data": {}}
    manifest = CheckpointManifest(step=step, optimizer_step=step, config=config, layout={"dp": 1}, shapes={})
    (path / MANIFEST).write_text("{" if damaged else manifest.to_json())
    return path


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def choose(folder: RunFolder, asked: int | str = "auto", requeued: bool = False) -> Start:
    config = TrainConfig(run_dir=str(folder), checkpoint=CheckpointConfig(resume=asked))
    return choose_start(config, folder, requeued=requeued)


def test_auto_takes_the_newest_whole_one_with_what_was_noted_since(folder):
    assert choose(folder) == Start()
    four, eight, nine = save(folder, 4), save(folder, 8, damaged=True), save(folder, 9, damaged=True)
    folder.path.joinpath("ledger.json").write_text(json.dumps({"skip": [7], "rewinds": []}))
    start = choose(folder)
    assert (start.checkpoint, start.by_hand, start.later) == (four, False, (eight, nine))
    assert start.ledger == Ledger([7])
    assert [path for path, problems in start.damage.items() if problems] == [nine, eight]


def test_a_checkpoint_without_its_manifest_is_damaged_and_stays(folder, tmp_path):
    """As where a copy of the run broke off, or the disk that a link leads to is not mounted."""
    four, eight = save(folder, 4), save(folder, 8)
    (eight / MANIFEST).unlink()
    (nine := folder.checkpoints / checkpoint_name(9)).symlink_to(tmp_path / "not mounted")
    start = choose(folder)
    assert (start.checkpoint, start.later) == (four, (eight, nine))
    assert choose(folder, 4).later == (eight, nine)
    leave_later_behind(folder, start, "auto")
    assert [path.name.partition("-")[0] for path in sorted(folder.checkpoints.iterdir())] == [
        "step_00000004",
        "step_00000008.damaged",
        "step_00000009.damaged",
    ]
    (four / MANIFEST).unlink()
    for asked, message in (("auto", "all checkpoints in .* are damaged"), ("none", "already holds step_00000004")):
        with pytest.raises(ConfigError, match=message):
            choose(folder, asked)


def test_a_runs_folder_stands_for_its_newest_checkpoint(folder, tmp_path):
    save(folder, 4)
    eight, other = save(folder, 8), RunFolder(tmp_path / "other")
    for path in (folder.path, folder.checkpoints, folder.checkpoints / "latest"):
        assert choose(other, str(path)).checkpoint == eight


def test_a_person_chooses_a_step_or_a_path_and_its_past(folder, tmp_path):
    four, eight, again = save(folder, 4), save(folder, 8), save(folder, 8, "step_00000008-again")
    folder.path.joinpath("ledger.json").write_text(json.dumps({"skip": [7], "rewinds": []}))
    start = choose(folder, 4)
    assert (start.checkpoint, start.by_hand, start.later, start.ledger) == (four, True, (eight, again), Ledger())
    # A kill while step 8 was replaced by a newer one of the same step left the newer under this name, maybe alone.
    assert choose(folder, 8).checkpoint == again
    shutil.rmtree(eight)
    assert choose(folder, "8").checkpoint == again
    elsewhere = save(RunFolder(tmp_path / "other"), 6)
    start = choose(folder, str(elsewhere))
    assert (start.checkpoint, start.later) == (elsewhere, (again,))


def test_a_requeued_job_goes_on_from_its_newest_one_as_soon_as_it_has_one(folder, tmp_path):
    elsewhere = save(RunFolder(tmp_path / "other"), 6)
    assert choose(folder, str(elsewhere), requeued=True).checkpoint == elsewhere
    save(folder, 7)
    assert choose(folder, str(elsewhere), requeued=True).checkpoint == folder.saved()[7]
    assert choose(folder, "none", requeued=True).checkpoint == folder.saved()[7]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("none", "checkpoint.resume=none, but run_dir=.* already holds step_00000004-again"),
        (5, "checkpoint.resume=5 does not exist; run_dir=.* has steps: 4$"),
        ("", "checkpoint.resume= does not exist"),
        ("/", "checkpoint.resume=/: / is not a checkpoint"),
    ],
)
def test_what_is_asked_for_and_not_there_is_an_error(folder, asked, message):
    save(folder, 4)
    save(folder, 4, "step_00000004-again")
    with pytest.raises(ConfigError, match=message):
        choose(folder, asked)


def test_later_ones_are_kept_and_named(folder, caplog):
    save(folder, 4)
    later = [save(folder, 8), save(folder, 9)]
    leave_later_behind(folder, choose(folder, 4), 4)
    assert list(folder.saved()) == [4]
    kept = sorted(folder.checkpoints.glob("*.rewound-*"))
    assert [path.name.partition(".")[0] for path in kept] == [path.name for path in later]
    assert "checkpoint.resume=4 is not the newest checkpoint; later ones are kept" in caplog.text
    assert all(str(path) in caplog.text for path in kept)
    assert choose(folder, str(kept[1])).checkpoint == kept[1]  # so one of them is gone on from


def agree_where_rank_1_sees(folder: str, view: str) -> tuple[str, Start | None]:
    """(what every rank raises, the start it goes on with)"""
    if dist.get_rank() == 1:
        if view == "stale":  # its host's cached listing lacks the newest
            RunFolder.whole_checkpoints = lambda folder: whole_checkpoints(folder.checkpoints)[:-1]
        else:  # run_dir is another folder there
            real = resume._fingerprint
            resume._fingerprint = lambda checkpoint: real(Path(folder).parent / view / checkpoint.name)
    try:
        return "", agree_on(lambda: choose(RunFolder(folder)))
    except ConfigError as error:
        return str(error), None


@pytest.mark.parametrize("view", ["stale", "empty", "other"])
def test_all_ranks_start_where_rank_0_says_or_none_does(folder, tmp_path, view):
    save(folder, 4)
    newest = save(folder, 6)
    there = tmp_path / "other" / newest.name
    there.mkdir(parents=True)
    (there / MANIFEST).write_text("another run's")
    found = run_ranks(2, agree_where_rank_1_sees, str(folder), view)
    if view == "stale":
        assert [start.checkpoint for _, start in found] == [newest, newest]
        return
    errors = [error for error, _ in found]
    assert errors[0] == errors[1]
    how = "cannot read its manifest.json (No such file or directory)" if view == "empty" else "sees another manifest"
    assert errors[0].startswith(f"checkpoint {newest}, which rank 0 chose, is not the same to all ranks: rank 1 (host ")
    assert how in errors[0]


class BadLines(Exception):
    """pickle makes it, and cannot load it."""

    def __init__(self, path: str, lines: int):
        super().__init__(f"{path} has {lines} bad lines")


def agree_on_what_rank_0_cannot_read() -> list[str]:
    said = []
    for error in (OSError(errno.ESTALE, "Stale file handle", "ledger.json"), BadLines("ledger.json", 3)):

        def choose(error=error) -> Start:
            if dist.get_rank() > 0:
                raise AssertionError("rank 0 alone reads, and writes")
            raise error

        try:
            agree_on(choose)
        except Exception as caught:
            said.append(str(caught))
    return said


def test_what_rank_0_cannot_read_ends_all_ranks_with_its_reason():
    stale, bad = "[Errno 116] Stale file handle: 'ledger.json'", "ledger.json has 3 bad lines"
    assert run_shared(2, agree_on_what_rank_0_cannot_read) == [[stale, bad], [stale, f"rank 0: BadLines: {bad}"]]


def agree_with_other_words() -> str:
    try:
        agree_on_settings(dataclasses.replace(TrainConfig(), seed=dist.get_rank()))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_than_rank_0_are_named():
    errors = run_ranks(3, agree_with_other_words)
    assert len(set(errors)) == 1
    assert "rank 1 (host " in errors[0]
    assert "seed: 0 -> 2; they have other command line overrides" in errors[0]


def agree_where_rank_1_has_no_data(data: str) -> str:
    try:
        agree_on_files({"data.manifest": data if dist.get_rank() == 0 else f"{data}/elsewhere"})
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_without_the_data_ends_the_run(tmp_path):
    (tmp_path / "manifest.json").touch()
    errors = run_shared(2, agree_where_rank_1_has_no_data, str(tmp_path / "manifest.json"))
    assert errors[0] == errors[1]
    assert "do not see what rank 0 has read: rank 1 (host " in errors[0]
    assert f" sees no data.manifest={tmp_path / 'manifest.json/elsewhere'};" in errors[0]


def test_the_order_of_names_is_that_of_age(folder):
    names = ["step_00000004", "step_00000004-again", "step_99999999", "step_100000000"]
    for name, step in zip(names, (4, 4, 99_999_999, 100_000_000), strict=True):
        save(folder, step, name)
    assert [path.name for path in folder.whole_checkpoints()] == names
    assert all(a < b for a, b in itertools.pairwise(folder.saved()))
