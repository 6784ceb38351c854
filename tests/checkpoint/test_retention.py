"""Which checkpoints stay."""

import json
import math
import multiprocessing
import shutil
from pathlib import Path

import pytest

from megatron_tn.checkpoint.manifest import MANIFEST, whole_checkpoints
from megatron_tn.checkpoint.retention import Retention, Saved, apply_retention, reading, remove, superfluous
from tests.helpers.training import fork_ranks

LOSSES = {100: 3.0, 200: 2.0, 300: None, 400: 2.5, 500: 2.1, 600: 2.2}
SAVED = [Saved(Path(f"step_{step:08d}"), step, loss) for step, loss in LOSSES.items()]


@pytest.mark.parametrize(
    ("retention", "stays"),
    [
        (Retention(), [100, 200, 300, 400, 500, 600]),
        (Retention(every=100, best=1), [100, 200, 300, 400, 500, 600]),
        (Retention(newest=1), [600]),
        (Retention(newest=2), [500, 600]),
        (Retention(newest=9), [100, 200, 300, 400, 500, 600]),
        (Retention(newest=1, every=200), [200, 400, 600]),
        (Retention(newest=1, best=2), [200, 500, 600]),
        (Retention(newest=2, every=300, best=1), [200, 300, 500, 600]),
        (Retention(newest=1, best=9), [100, 200, 400, 500, 600]),
    ],
    ids=str,
)
def test_what_stays(retention, stays):
    gone = superfluous(list(reversed(SAVED)), retention)
    assert [one.step for one in SAVED if one.path not in gone] == stays


def test_a_loss_that_is_no_number_is_not_the_best():
    losses = [math.nan, 3.0, 2.0, 2.5]
    saved = [Saved(Path(f"step_{step:08d}"), step, loss) for step, loss in enumerate(losses)]
    gone = superfluous(saved, Retention(newest=1, best=1))
    assert [path.name for path in gone] == ["step_00000000", "step_00000001"]


def make(folder: Path, step: int, held_out: dict | None = None) -> Path:
    path = folder / f"step_{step:08d}"
    path.mkdir()
    (path / MANIFEST).write_text(json.dumps({"training": {"held_out": held_out}}))
    return path


def test_the_loss_counts_at_its_own_step_only(tmp_path):
    make(tmp_path, 100, {"step": 100, "heldout_loss": 2.0})
    make(tmp_path, 200, {"step": 100, "heldout_loss": 1.0})  # carried over from an earlier evaluation
    make(tmp_path, 300)
    assert [path.name for path in apply_retention(tmp_path, Retention(newest=1, best=1))] == ["step_00000200"]


def read(checkpoint: Path, begun, done) -> None:
    with reading(checkpoint):
        begun.set()
        done.wait(60)


def test_one_that_another_process_reads_is_left_until_it_is_done(tmp_path):
    first, _ = make(tmp_path, 1), make(tmp_path, 2)
    begun, done = (multiprocessing.get_context("forkserver").Event() for _ in range(2))
    (reader,) = fork_ranks(1, read, first, begun, done)
    assert begun.wait(60)
    assert apply_retention(tmp_path, Retention(newest=1)) == []
    done.set()
    reader.join()
    assert apply_retention(tmp_path, Retention(newest=1)) == [first]


def test_a_removal_cut_short_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    first, second = make(tmp_path, 1), make(tmp_path, 2)

    def die(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove(first)
    assert whole_checkpoints(tmp_path) == [second]


def test_of_a_link_to_another_disk_the_link_goes_and_its_target_stays(tmp_path):
    """People move old checkpoints to another disk, and put links in their places."""
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    folder.mkdir()
    disk.mkdir()
    first, second = make(disk, 1), make(folder, 2)
    link = folder / first.name
    link.symlink_to(first)
    link.with_suffix(".old").symlink_to(tmp_path / "nowhere")  # what an earlier release left of another
    make(folder, 3)
    assert apply_retention(folder, Retention(newest=1)) == [link, second]
    assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    assert (first / MANIFEST).is_file()


def test_what_cannot_be_removed_is_a_warning_and_no_failed_save(tmp_path, monkeypatch, caplog):
    make(tmp_path, 1), make(tmp_path, 2)
    monkeypatch.setattr("shutil.rmtree", lambda _: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
    assert apply_retention(tmp_path, Retention(newest=1)) == []
    assert "could not be removed: OSError: [Errno 16] Device or resource busy" in caplog.text


def test_two_readers_may_read_at_once(tmp_path):
    first = make(tmp_path, 1)
    with reading(first), reading(first):
        pass


def test_a_copy_under_a_name_of_its_own_is_no_checkpoint_of_the_run(tmp_path):
    own = make(tmp_path, 100)
    for name in ("step_00000100_copy", "step_00000200 (1)", "step_best", "step_00000300.bak"):
        shutil.copytree(own, tmp_path / name)
    assert whole_checkpoints(tmp_path) == [own]
    assert apply_retention(tmp_path, Retention(newest=1)) == []
