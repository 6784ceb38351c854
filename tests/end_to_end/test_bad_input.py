"""Bad input: one clear line each, exit code 2, before anything is started or overwritten."""

from __future__ import annotations

import shutil

import pytest
import torch.distributed as dist

from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.generate import main as generate
from megatron_tn.score import main as score
from megatron_tn.train import main as train
from tests.helpers.training import SMALL, call


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["model.embd_dim=64"], ["unknown setting model.embd_dim; did you mean model.embed_dim"]),
        (["lr=3"], ["unknown setting lr; did you mean optim.lr"]),
        (
            ["engine=zero4"],
            ["engine=zero4: conf/engine has fsdp2, local, zero0, zero1, zero2, zero3; did you mean zero"],
        ),
        (["engine.zero_stage=7"], ["engine.zero_stage=7: input should be 0, 1, 2 or 3"]),
        (["optim.lr=fast"], ["optim.lr='fast': input should be a valid number"]),
        (["parallel.tp=3"], ["model.heads=4 is not divisible by parallel.tp=3", "world size 1 is not a multiple of"]),
        (["parallel.tp=2"], ["world size 1 is not a multiple of parallel.tp=2 x parallel.cp=1 = 2"]),
        (
            ["data.global_batch=3", "data.micro_batch=2"],
            ["data.global_batch=3 is not a multiple of data.micro_batch=2"],
        ),
        (["model.vocab_size=300"], ["model.vocab_size=300 is smaller than the 401 entries of the tokenizer"]),
        (["checkpoint.resume=nowhere"], ["checkpoint.resume=nowhere does not exist"]),
        (["checkpoint.resume=-3"], ["checkpoint.resume=-3 does not exist"]),
        (["engine.reduce_bucket_elements=0"], ["engine.reduce_bucket_elements=0 must be at least 1"]),
        (
            ["optim.beta2=1.5", "optim.clip_norm=-1"],
            ["optim.beta2=1.5 must be from 0 to below 1", "optim.clip_norm=-1"],
        ),
        (["optim.lr=nan"], ["optim.lr=nan must be above 0, and finite"]),
        (["schedule.min_lr_ratio=2"], ["schedule.min_lr_ratio=2.0 must be from 0 to 1"]),
        (["data.manifest=nowhere.json"], ["data.manifest: manifest nowhere.json: No such file"]),
        (["schedule.warmup_steps=5000"], ["schedule.warmup_steps=5000 must be below schedule.steps=1000"]),
        (["what is this"], ["not an override"]),
        (["+data.mixture.epochs.wiki=2"], ["data.manifest: mixture"]),
        (["data.filter=nowhere.yaml"], ["data.manifest: filter nowhere.yaml: No such file"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_settings(shards, tmp_path, capsys, words, messages):
    run = tmp_path / "run"
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={run}", *words) == 2
    said = capsys.readouterr().err
    for message in messages:
        assert f"error: {message}" in said
    assert "Traceback" not in said
    assert not run.exists()
    assert not dist.is_initialized()


def test_a_deepspeed_config_that_contradicts_the_run(shards, tmp_path, capsys):
    """Named before anything starts; a free key in the same file is none of the problems."""
    file, run = tmp_path / "deepspeed.json", tmp_path / "run"
    file.write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}, "optimizer": {"type": "Adam"}}')
    words = (f"engine.deepspeed_config={file}", f"data.manifest={shards}", f"run_dir={run}")
    assert call(train, *SMALL, *words) == 2
    said = capsys.readouterr().err
    assert "zero_optimization.stage=3 contradicts engine.zero_stage, by which it is 1" in said
    assert "optimizer={'type': 'Adam'} is not taken; its place is optim" in said
    assert said.count("error:") == 2
    assert not run.exists()


def test_every_problem_is_named_at_once(tmp_path, capsys):
    assert call(train, *SMALL, "parallel.tp=3", "data.micro_batch=0", "optim.lr=-1", f"run_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    for name in ("model.heads=4", "data.micro_batch=0", "optim.lr=-1", "data.manifest: not set", "world size 1"):
        assert name in said


def test_a_filter_whose_counts_are_missing_names_the_command_that_makes_them(shards, tmp_path, capsys):
    band = 'data.filter=\'{"scores": "small", "default": [1.0, 3.0]}\''
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", band) == 2
    assert "python -m data_pipeline.stream.count" in capsys.readouterr().err


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


def test_a_run_folder_that_cannot_be_made(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'file' / 'run'}") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("main", [generate, evaluate, convert, score], ids=["generate", "evaluate", "convert", "score"])
@pytest.mark.parametrize(
    ("words", "message"),
    [([], "checkpoint is not set"), (["checkpoint=nowhere"], "checkpoint=nowhere: there is no checkpoint")],
    ids=["unset", "absent"],
)
def test_checkpoints_that_are_not_there(capsys, main, words, message):
    assert call(main, *words) == 2
    assert message in capsys.readouterr().err


def test_scoring_names_every_problem(capsys):
    assert call(score, "name=a/b", "batch_tokens=0", "manifest=nowhere.json", "checkpoint=nowhere") == 2
    said = capsys.readouterr().err
    for problem in (
        "batch_tokens=0 must be",
        "name='a/b' must be",
        "manifest nowhere.json",
        "checkpoint=nowhere: there",
    ):
        assert problem in said


def test_the_deepspeed_launchers_argument_is_no_setting(shards, tmp_path, capsys):
    words = (*SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", "--local_rank=0", "parallel.tp=3")
    assert call(train, *words) == 2
    assert "local_rank" not in capsys.readouterr().err
