"""Bad settings: one clear line each, exit code 2, before anything is started or overwritten."""

import os
import sys
import time

import pytest
import torch.distributed as dist

from megatron_tn.benchmark import main as benchmark
from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.generate import main as generate
from megatron_tn.parallel.world import of_first
from megatron_tn.plan import main as plan
from megatron_tn.score import main as score
from megatron_tn.train import main as train
from tests.helpers.training import SMALL, call, fork_ranks, train_here

GRADIENT_DTYPE = "engine.gradient_dtype=bf16 needs engine.name=deepspeed and engine.precision=bf16; here"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["model.embd_dim=64"], ["unknown setting model.embd_dim; did you mean model.embed_dim"]),
        (
            ["lr=3", "engine=zero4", "optim.beta2=3", "schedule.steps=-1"],
            [
                "unknown setting lr; did you mean optim.lr",
                "engine=zero4: conf/engine has",
                "optim.beta2=3.0 must be from 0 to below 1",
                "schedule.steps=-1 must be at least 1",
            ],
        ),
        (
            ["engine=zero4"],
            ["engine=zero4: conf/engine has fsdp2, local, zero0, zero1, zero2, zero3; did you mean zero"],
        ),
        (["engine.zero_stage=7"], ["engine.zero_stage=7: input should be 0, 1, 2 or 3"]),
        (["optim.lr=fast"], ["optim.lr='fast': input should be a valid number"]),
        (["parallel.tp=3"], ["model.heads=4 is not divisible by parallel.tp=3", "world size 1 is not a multiple of"]),
        (
            ["parallel.tp=2"],
            ["world size 1 is not a multiple of parallel.tp=2 x parallel.cp=1 = 2; launch/local.sh -n 2 starts as"],
        ),
        (
            ["data.global_batch=3", "data.micro_batch=2"],
            ["data.global_batch=3 is not a multiple of data.micro_batch=2"],
        ),
        (["model.vocab_size=300"], ["model.vocab_size=300 is smaller than the 401 entries of the tokenizer"]),
        (
            ["checkpoint.resume=nowhere", "data.manifest=nowhere.json"],
            ["checkpoint.resume=nowhere does not exist", "data.manifest=nowhere.json: No such file"],
        ),
        (
            [
                *("optim.lr=nan", "optim.beta2=1.5", "optim.clip_norm=-1", "optim.weight_decay=inf"),
                *("model.norm_eps=-1", "model.init_std=nan", "schedule.min_lr_ratio=2"),
                *("engine.reduce_bucket_elements=0", "cluster.bf16_tflops=0", "distributed_timeout_s=8000000000"),
            ],
            [
                "optim.lr=nan must be above 0, and finite",
                "optim.beta2=1.5 must be from 0 to below 1",
                "optim.clip_norm=-1",
                "optim.weight_decay=inf must be finite",
                "model.norm_eps=-1.0 must be at least 0",
                "model.init_std=nan",
                "schedule.min_lr_ratio=2.0 must be from 0 to 1",
                "engine.reduce_bucket_elements=0 must be at least 1",
                "cluster.bf16_tflops=0.0 must be above 0",
                "distributed_timeout_s=8000000000 must be from 1 to 1000000000",
            ],
        ),
        (["schedule.warmup_steps=5000"], ["schedule.warmup_steps=5000 must be below schedule.steps=1000"]),
        (["what is this"], ["not an override"]),
        (["+data.mixture.epochs.wiki=2"], ["data.mixture: no source or category 'wiki'"]),
        (
            ["data.filter=nowhere.yaml", "checkpoint.resume=-3"],
            ["data.filter=nowhere.yaml: No such file", "checkpoint.resume=-3 does not exist"],
        ),
        (["data.filter=os:getcwd"], ["data.filter=os:getcwd: it is <built-in function getcwd>, which has no"]),
        (["data.document_stages=[os:sep]"], ["data.document_stages=os:sep: it is '/', which is no function"]),
        (["model=null"], ["model=null: conf/model has 13b, "]),
        (["optim.lr=1e-3,1e-2"], ["optim.lr=1e-3,1e-2: a sweep over several values needs --multirun"]),
        (["seed=18446744073709551616"], ["seed=18446744073709551616 must be from 0 to 18446744073709551615"]),
        (
            ["engine=fsdp2", "engine.gradient_dtype=bf16"],
            [f"{GRADIENT_DTYPE} engine.name=fsdp2, engine.precision=bf16"],
        ),
        (
            ["engine.precision=fp32", "engine.gradient_dtype=bf16"],
            [f"{GRADIENT_DTYPE} engine.name=deepspeed, engine.precision=fp32"],
        ),
        (["data.skip_batches=['1-99999999999']"], ["data.skip_batches: step 99999999999 is above schedule.steps=1000"]),
        (["checkpoint.resume=null"], ["checkpoint.resume=None: input should be a valid integer"]),
        (["checkpoint.resume=/"], ["checkpoint.resume=/: / is not a checkpoint"]),
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


def read_late(overrides: tuple[str, ...]) -> None:
    """Train; rank 1 asks for what rank 0 has read a while after it."""
    from megatron_tn import preflight

    def late(*args, **options):
        time.sleep(0.4 * (os.environ["RANK"] == "1"))
        return of_first(*args, **options)

    preflight.of_first = late
    train_here(overrides)


def test_rank_0_which_serves_the_ranks_store_ends_after_they_have_the_lines(shards, tmp_path):
    words = (*SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", "optim.beta2=3")
    ranks = fork_ranks(2, read_late, words)
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [2, 2]


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


def test_a_bound_that_the_stream_has_too_is_named_once(shards, tmp_path, capsys):
    words = ("seed=-1", "data.shuffle_window=0", "data.sequence_length=-7")
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", *words) == 2
    named = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert sorted(named) == sorted(words)


def test_a_list_that_hydra_cannot_read_is_told_how_to_be_written(shards, tmp_path, capsys):
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path}/run", "data.document_stages=[a") == 2
    said = capsys.readouterr().err
    assert "error: not an override: 'data.document_stages=[a'" in said
    assert "in quotes of its own" in said


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["model=demo,nosuch"], ["model=nosuch: conf/model has"]),
        (
            ["optim.lr=1e-3,-1,fast", "model.decay=paper,papre"],
            ["optim.lr=-1.0 must be above 0", "optim.lr='fast': input", "model.decay='papre': input should be"],
        ),
    ],
    ids=["choice", "values"],
)
def test_a_sweep_is_checked_before_its_first_job(shards, tmp_path, capsys, words, messages):
    run = tmp_path / "run"
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={run}", *words, "--multirun") == 2
    said = capsys.readouterr().err
    for message in messages:
        assert said.count(f"error: {message}") == 1
    assert not run.exists()


@pytest.mark.parametrize(
    ("main", "words", "messages"),
    [
        (
            generate,
            ["max_new_tokens=-1", "seed=-1", "temperature=nan"],
            ["max_new_tokens=-1 must", "seed=-1 must", "temperature=nan must"],
        ),
        (
            evaluate,
            [
                *("max_documents=-1", "batch_tokens=0", "output=/nowhere/file"),
                *("max_document_tokens=1", "sequence_tokens=1", "tp=2", "shots=3"),
            ],
            [
                *("max_documents=-1 needs manifest, which is not set", "shots=3 needs tasks, which is not set"),
                *("manifest is not set", "max_documents=-1 must", "batch_tokens=0 must", "output=/nowhere/file cannot"),
                *("max_document_tokens=1 must be 0 or at least 2", "sequence_tokens=1 must be 0 or at least 2"),
                "tp=2 must divide the number of processes, which is 1",
            ],
        ),
        (
            convert,
            ["verify", "checkpoint=runs/mine", "output=copy", "shard_mib=9"],
            [
                "shard_mib=9 is of export, not of action=verify",
                "output=copy is of export and import, not of action=verify",
            ],
        ),
        (convert, ["import", "json=true"], ["json=true is of describe and verify, not of action=import"]),
        (benchmark, ["benchmark.steps=0", "benchmark.loop_steps=-1"], ["benchmark.steps=0", "benchmark.loop_steps=-1"]),
        (plan, ["nodes=0"], ["nodes=0 must be from 1 to 1000000"]),
        (
            plan,
            ["cluster.matrix_rates={}"],
            ["Error merging override cluster.matrix_rates={}: Cannot merge DictConfig"],
        ),
    ],
    ids=["generate", "evaluate", "verify", "import", "benchmark", "plan", "a mapping for a list"],
)
def test_values_that_other_commands_cannot_have(capsys, main, words, messages):
    assert call(main, *words) == 2
    said = capsys.readouterr().err
    for message in messages:
        assert f"error: {message}" in said


@pytest.mark.parametrize("main", [evaluate, train], ids=["evaluate", "train"])
def test_tasks_without_the_extra(shards, capsys, monkeypatch, main):
    for module in ("lm_eval", "lm_eval.tasks"):  # another test may have imported it
        monkeypatch.setitem(sys.modules, module, None)
    prefix = "" if main is evaluate else "evaluation."
    words = (*SMALL, f"data.manifest={shards}") if main is train else ()
    assert call(main, *words, f"{prefix}tasks=boolq") == 2
    assert f"error: {prefix}tasks needs the extra eval, pip install -e '.[eval]': " in capsys.readouterr().err


def test_parts_of_other_files_are_no_choices(capsys):
    assert call(train, "model=nosuch") == 2
    assert ", 7b, demo, " in capsys.readouterr().err


def test_a_word_that_is_no_action_of_convert(capsys):
    assert call(convert, "exprt", "checkpoint=runs/mine") == 2
    assert "action='exprt': input should be 'describe', 'verify', 'export' or 'import'" in capsys.readouterr().err


def test_scoring_names_every_problem(capsys):
    assert call(score, "name=a/b", "batch_tokens=0", "manifest=nowhere.json", "checkpoint=nowhere") == 2
    said = capsys.readouterr().err
    for problem in (
        "batch_tokens=0 must be",
        "name='a/b' must be",
        "error: manifest=nowhere.json: No such file",
        "checkpoint=nowhere: no checkpoint",
    ):
        assert problem in said


def test_the_deepspeed_launchers_argument_is_no_setting(shards, tmp_path, capsys):
    words = (*SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", "--local_rank=0", "parallel.tp=3")
    assert call(train, *words) == 2
    assert "local_rank" not in capsys.readouterr().err
