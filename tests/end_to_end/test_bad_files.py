"""Files and folders that are damaged, absent or of another kind: one line each, exit code 2, nothing is overwritten."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.generate import main as generate
from megatron_tn.score import main as score
from megatron_tn.train import main as train
from tests.helpers.training import SMALL, call


def test_a_filter_whose_counts_are_missing_names_the_command_that_makes_them(shards, tmp_path, capsys):
    band = 'data.filter=\'{"scores": "small", "default": [1.0, 3.0]}\''
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", band) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: data.filter: {shards.parent}/")
    assert "python -m data_pipeline.stream.count" in said


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_shards(shards, tmp_path, capsys, harm):
    copy = shutil.copytree(shards.parent, tmp_path / "shards")
    victim = sorted(copy.glob("*.tar"))[0]
    if harm == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1000])
    assert call(train, *SMALL, f"data.manifest={copy / 'manifest.json'}", f"run_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert victim.name in said
    assert harm in said
    assert not (tmp_path / "run").exists()


def test_a_run_folder_without_a_name(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train, *SMALL, f"data.manifest={shards}", "run_dir=") == 2
    assert "run_dir='' must name a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_that_could_not_be_saved_at_the_end(shards, tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("in the way")
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path}") == 2
    assert f"cannot be written: {tmp_path / 'checkpoints'} is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b'{"seed": ', b"[]", b"\xff\xfe"], ids=["torn", "list", "bytes"])
def test_a_frozen_config_that_is_damaged(shards, tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path}") == 2
    assert f"error: {tmp_path / 'config.json'} is damaged" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == content


def test_held_out_shards_without_anything_to_predict(shards, tmp_path, capsys):
    manifest = Manifest.load(shards)
    shutil.copy(manifest.directory / "tokenizer.json", tmp_path)
    with ShardWriter(tmp_path, "part", dtype=np.dtype("uint16"), shard_tokens=100) as writer:
        writer.write(np.array([1]), id="only", source="test", text_bytes=1)
    Manifest.create(tmp_path, manifest.content.tokenizer, writer.shards).save()
    held_out = f"evaluation.manifest={tmp_path / 'manifest.json'}"
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", held_out) == 2
    assert f"error: {held_out} holds nothing to predict" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "message"), [("ranks/run", ""), (".", ": its folder ranks")], ids=["run", "ranks"])
def test_a_run_folder_that_cannot_be_made(shards, tmp_path, capsys, run, message):
    (tmp_path / "ranks").write_text("in the way")
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / run}") == 2
    assert f"{message} cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ranks"]


@pytest.mark.parametrize("main", [generate, evaluate, convert, score], ids=["generate", "evaluate", "convert", "score"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "checkpoint is not set"),
        (["checkpoint=nowhere"], "checkpoint=nowhere: no checkpoint"),
        (["--multirun", "checkpoint=a,b"], " has no run_dir for a sweep; call it once for each value"),
        (["hydra.mode=MULTIRUN", "precision=fp32,bf16"], " has no run_dir for a sweep; call it once for each value"),
        (["precision=fp32,bf16"], "precision=fp32,bf16: a sweep over several values is not for "),
    ],
    ids=["unset", "absent", "sweep", "mode", "values"],
)
def test_checkpoints_that_are_not_there(capsys, main, words, message):
    assert call(main, *words) == 2
    assert message in capsys.readouterr().err


NO_CHECKPOINT = "no checkpoint, run or released model is there"
OF_SHARDS = "shards/manifest.json is of the format 'megatron_tn.shards', not 'megatron_tn checkpoint'"
RUN = (*SMALL, "data.manifest=shards/manifest.json", "run_dir=new")
WRONG_KINDS = [  # a command, and its settings of `wrong_kinds`, each with its one line
    (
        train,
        RUN,
        {
            "init_from=shards": f": {NO_CHECKPOINT}: {OF_SHARDS}",
            "run_dir=shards": " is the folder of a checkpoint or of shards: it has a manifest.json: name another for",
            "data.manifest=released": ": it is a folder; name the manifest.json of shards",
            "evaluation.manifest=torn/manifest.json": ": document=b'{",
        },
    ),
    (
        train,
        RUN,
        {
            "init_from=torn": " cannot be read: torn/manifest.json is damaged: ",
            "run_dir=released": " is the folder of a released model: it has config.json and model.safetensors: name",
            "evaluation.manifest=shards/tokenizer.json": ": format='' is not 'megatron_tn.shards': no manifest",
            "data.filter=shards/tokenizer.json": ": it does not name its scores; a f",
        },
    ),
    (
        train,
        RUN,
        {
            "checkpoint.resume=words.txt": " is a file, not a checkpoint's folder; run_dir=new has steps: none",
            "data.manifest=torn": ": it is a folder; name the file torn/manifest.json",
            "evaluation.manifest=saved": ": it is a folder; name the manifest.json of shards",
        },
    ),
    (
        evaluate,
        (),
        {
            "checkpoint=shards": f": {NO_CHECKPOINT}: {OF_SHARDS}",
            "manifest=shards/tokenizer.json": ": format='' is not 'megatron_tn.shards': no manifest",
            "train_manifest=shards": ": it is a folder; name the file shards/manifest.json",
        },
    ),
    (
        generate,
        ("prompt=a",),
        {
            "checkpoint=words.txt": f": {NO_CHECKPOINT}",
            "state=shards": " cannot be read: it is a folder: name a file that save_state wrote",
        },
    ),
    (
        generate,
        ("prompt=a",),
        {"checkpoint=.": f": {NO_CHECKPOINT}, but in folders of it: saved\n"},
    ),
    (
        generate,
        ("prompt=a",),
        {"checkpoint=begun": f": {NO_CHECKPOINT}: the run has no whole checkpoint yet"},
    ),
    (
        generate,
        ("prompt=a", "checkpoint=released"),
        {"tokenizer=shards": " is a folder: name a tokenizer.json"},
    ),
    (
        generate,
        ("prompt=a", "checkpoint=released"),
        {"tokenizer=words.txt": " cannot be read as a tokenizer.json: "},
    ),
    (
        generate,
        ("prompt=a", "tokenizer=shards/tokenizer.json"),
        {"checkpoint=released": " cannot be read: released/config.json is of a run, not of a model in the released"},
    ),
]


@pytest.fixture(scope="module")
def wrong_kinds(tmp_path_factory, shards) -> Path:
    """A folder with shards, a torn manifest, a text, and what begins a released model and a run."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "shards").symlink_to(shards.parent)
    for name, file, content in (
        ("torn", "manifest.json", '{"seed"'),
        ("saved", "manifest.json", '{"format": "megatron_tn checkpoint"}'),
        ("released", "config.json", '{"model": {}}'),
        ("begun", "status.json", "{}"),
        (".", "words.txt", "a b"),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(content)
    (folder / "released/model.safetensors").touch()
    return folder


@pytest.mark.parametrize(("main", "words", "lines"), WRONG_KINDS, ids=[" ".join(case[2]) for case in WRONG_KINDS])
def test_files_and_folders_of_another_kind(wrong_kinds, capsys, monkeypatch, main, words, lines):
    monkeypatch.chdir(wrong_kinds)
    assert call(main, *words, *lines) == 2
    said = capsys.readouterr().err
    for word, line in lines.items():
        assert f"error: {word}{line}" in said
        assert len(re.findall(rf"^error: {re.escape(word.partition('=')[0])}\W", said, re.MULTILINE)) == 1
    assert not Path("new").exists()
