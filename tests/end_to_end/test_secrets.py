"""A run whose settings hold secrets, in a folder with a hostile name: no file of it has them, and it goes on."""

import importlib.util
import json
import os
import stat
import sys

import pytest

from launch import report
from megatron_tn.checkpoint.manifest import MANIFEST
from megatron_tn.train import main
from megatron_tn.training.run_folder import RunFolder
from tests.helpers.training import SMALL, call, fork_ranks, losses

SECRET, TOKEN = "mellon-and-friend", "c0ffee-token"
HOSTILE = """it's a "run" $(touch marker) `touch marker`; touch marker &|<> =,[x] %A\\"""


def _train(door: str | None, words: tuple[str, ...], errors: str) -> None:
    os.umask(0o027)
    os.environ.pop("DOOR", None)
    if door:
        os.environ["DOOR"] = door
    os.environ["SLURM_JOB_ID"], os.environ["SLURM_RESTART_COUNT"] = "7", str(int("stop_after=2" not in words))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.exit(call(main, *words))


@pytest.fixture
def train(tmp_path):
    """train(value of the variable DOOR, *words): the exit code, and what was said, of one process."""

    def run(door: str | None, *words: str) -> tuple[int, str]:
        errors = tmp_path / "errors"
        errors.write_text("")
        (rank,) = fork_ranks(1, _train, door, words, str(errors))
        rank.join(timeout=120)
        return rank.exitcode, errors.read_text()

    return run


def test_secrets_are_in_no_file_and_are_asked_for_again(shards, tmp_path, train, monkeypatch, capsys):
    folder = tmp_path / HOSTILE
    (tmp_path / SECRET).symlink_to(shards.parent)
    (tmp_path / "moved").symlink_to(shards.parent)
    words = [*SMALL, "engine=local", "logging.wandb.mode=offline", f"run_dir={folder}", "schedule.steps=4"]
    words += ["logging.tensorboard=true"] if importlib.util.find_spec("tensorboard") else []
    words += [
        f"data.manifest={tmp_path}/${{oc.env:DOOR}}/manifest.json",
        f"cluster.name=x://me:{TOKEN}@host/?k",
    ]
    code, said = train(SECRET, *words, "stop_after=2")
    assert code == 0, said
    stored = json.loads((folder / "config.json").read_text())
    assert stored["data"]["manifest"] == f"{tmp_path}/${{oc.env:DOOR}}/manifest.json"
    assert stored["cluster"]["name"] == "x://***@host/?***"
    newest = RunFolder(folder).whole_checkpoints()[-1]
    assert json.loads((newest / MANIFEST).read_text())["config"]["data"] == stored["data"]

    stored["logging"]["wandb"]["mode"] = "disabled"
    (folder / "config.json").write_text(json.dumps(stored | {"stop_after": 0}))
    code, said = train("moved", *words)  # requeued: the variable has another value
    assert code == 0, said
    assert list(losses(folder)) == [1, 2, 3, 4]
    monkeypatch.setenv("DOOR", SECRET)
    before = os.umask(0o027)
    assert call(report.main, str(folder)) == 0
    os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert "${oc.env:DOOR}" in (folder / "report.html").read_text()
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content, path
        assert TOKEN.encode() not in content, path
        assert not stat.S_IMODE(path.stat().st_mode) & 0o027, f"{path} is wider than the umask"
    assert not list(tmp_path.rglob("marker"))

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    other = [word for word in words if "cluster" not in word]
    refusals = {
        "data.manifest=": ("nowhere-at-all", words),
        "data.manifest: ": (None, words),
        "cluster.name=x://***@host/?***: the credentials are not stored": ("moved", other),
    }
    for message, (door, command) in refusals.items():
        monkeypatch.setenv("DOOR", door) if door else monkeypatch.delenv("DOOR")
        assert call(main, *command) == 2
        said = capsys.readouterr().err
        assert f"error: {message}" in said
        assert "nowhere-at-all" not in said
