"""Bad input: one clear line each, exit code 2, before anything is started or overwritten."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import ShardWriter
from megatron_tn.benchmark import main as benchmark
from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.generate import main as generate
from megatron_tn.plan import main as plan
from megatron_tn.score import main as score
from megatron_tn.train import main as train
from tests.helpers.training import SMALL, call

GRADIENT_DTYPE = "engine.gradient_dtype=bf16 needs engine.name=deepspeed and engine.precision=bf16; here"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["model.embd_dim=64"], ["unknown setting model.embd_dim; did you mean model.embed_dim"]),
        (["data.mixture.epochs.web=2"], ["data.mixture.epochs.web is not set yet: +data.mixture.epochs.web=2 adds it"]),
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
                *("engine.reduce_bucket_elements=0", "cluster.bf16_tflops=0"),
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
                *("max_document_tokens=1", "sequence_tokens=1", "tp=2"),
            ],
            [
                *("manifest is not set", "max_documents=-1 must", "batch_tokens=0 must", "output=/nowhere/file cannot"),
                *("max_document_tokens=1 must be 0 or at least 2", "sequence_tokens=1 must be 0 or at least 2"),
                "tp=2 must divide the number of processes, which is 1",
            ],
        ),
        (benchmark, ["benchmark.steps=0", "benchmark.loop_steps=-1"], ["benchmark.steps=0", "benchmark.loop_steps=-1"]),
        (plan, ["nodes=0"], ["nodes=0 must be from 1 to 1000000"]),
        (
            plan,
            ["cluster.matrix_rates={}"],
            ["Error merging override cluster.matrix_rates={}: Cannot merge DictConfig"],
        ),
    ],
    ids=["generate", "evaluate", "benchmark", "plan", "a mapping for a list"],
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


@pytest.mark.parametrize(("run", "message"), [("ranks/run", ""), (".", ": its folder ranks")], ids=["run", "ranks"])
def test_a_run_folder_that_cannot_be_made(shards, tmp_path, capsys, run, message):
    (tmp_path / "ranks").write_text("in the way")
    assert call(train, *SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / run}") == 2
    assert f"{message} cannot be written" in capsys.readouterr().err


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
