"""Files that are written whole, under names nobody can foresee, and through no link."""

import fcntl
import re

import pytest

from data_pipeline.files import open_lock, open_temporary, replace_file, replacing


def test_a_link_in_a_file_s_place_is_replaced_and_its_target_left(tmp_path):
    (tmp_path / "victim").write_text("kept")
    for name in ("a", "a.tmp", ".a.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "victim").read_text() == "kept"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(tmp_path / "lock")
    assert not (tmp_path / "victim").exists()


def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(tmp_path):
    path = tmp_path / "a[1]*.json"
    left, file = open_temporary(path)
    file.close()  # as the end of its process would
    assert re.fullmatch(r"\.a\[1\]\*\.json\.[0-9a-f]{16}\.tmp", left.name)
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_body_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "a"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_lock_is_one(tmp_path):
    with open_lock(tmp_path / "lock") as one, open_lock(tmp_path / "lock") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
