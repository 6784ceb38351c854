"""launch.submit: what it refuses, freezes, writes and shows; sbatch is a program that notes its words."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.submission.checks import check, disk_problems
from launch.submission.script import override
from launch.submit import main as submit
from megatron_tn.cli.overrides import CommandLine
from megatron_tn.config import ClusterConfig, ParallelConfig, load
from megatron_tn.config.slurm import SlurmConfig, SubmitConfig
from megatron_tn.training.run_folder import SUBMITTED, RunFolder
from megatron_tn.training.submission import Submission
from tests.helpers.shards import make_text_shards
from tests.helpers.training import ROOT, SMALL, call

HOSTILE = """it's a "run" $(touch marker) `touch marker`; touch marker &|<>*? =,[x] %A #"""
SBATCH = """#!/bin/bash
printf '%s\\0' "$@" "$(<"${@: -1}")" >>"$0.words"
echo $(($(grep -c -z -x -- --parsable "$0.words") + 16))
exit ${SBATCH_FAILS:-0}
"""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_text_shards(folder)
    return folder / "manifest.json"


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """sbatch(): the words of each of its calls; the last is the script's text."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(SUBMITTED, raising=False)

    def calls() -> list[list[str]]:
        words = program.with_name("sbatch.words")
        text = words.read_text() if words.exists() else ""
        return [call.split("\0")[:-1] for call in text.split("--parsable\0")[1:]]

    yield calls
    assert not list(tmp_path.rglob("marker"))


@pytest.fixture
def words(manifest) -> list[str]:
    """A run that can be submitted, but for run_dir."""
    return [*SMALL, "engine=local", "cluster=cpu", f"data.manifest={manifest}", "schedule.steps=50"]


def options_of(script: str) -> dict[str, str]:
    lines = [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(words) == 1 for words in lines)
    return dict(words[0].removeprefix("--").partition("=")[::2] for words in lines)


def test_a_run_is_written_shown_and_submitted(sbatch, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee-c0ffee-c0ffee")
    run = tmp_path / "runs/first"
    more = ["nodes=2", "slurm.processes_per_node=2", "slurm.time=2-00", "slurm.account=lab", "slurm.failures=5"]
    assert call(submit, *words, *more, f"run_dir={run}", "optim.lr=1e-2") == 0
    ((path, script),) = sbatch()
    (submission,) = Submission.all_of(RunFolder(run))
    assert (path, script) == (str(submission.script), submission.script.read_text().rstrip("\n"))
    options = options_of(script)
    assert options["nodes"] == "2"
    assert (options["time"], options["account"], options["job-name"]) == ("2-00", "lab", "first")
    assert {"gres", "partition", "qos", "array"}.isdisjoint(options)
    assert options["output"] == f"{submission.path}/%j.log"
    said = capsys.readouterr().out
    for shown in ("4 processes: tp 1 x cp 1 x dp 4", "1 to 50", "6,400", "job 17", "command: sbatch", "jobs of 2-00"):
        assert shown in said
    record = submission.read()
    assert (record["jobs"], record["world_size"], record["runs"]) == (["17"], 4, [str(run)])
    assert len(record["revision"]) == 40
    assert load(submission.config_file).optim.lr == 1e-2
    assert "torch==" in (submission.path / "packages.txt").read_text()
    for file in submission.path.iterdir():
        assert os.environ["WANDB_API_KEY"] not in file.read_text()
    RunFolder(run).freeze(load(submission.config_file), "17")
    assert call(submit, *words, f"run_dir={run}", "optim.lr=2e-2", "dry_run=true") == 0
    said = capsys.readouterr().out
    assert "and win: nodes: 2 -> 1; optim.lr: 0.01 -> 0.02" in said
    assert "not submitted" in said
    assert len(sbatch()) == 1
    RunFolder(run).config_file.write_text('{"model": 5}')  # of another program
    assert call(submit, *words, f"run_dir={run}", "dry_run=true") == 0
    assert "and win: checkpoint: None -> " in capsys.readouterr().out


def test_hostile_names_are_words_and_nothing_else(sbatch, words, tmp_path):
    run, name = tmp_path / HOSTILE, HOSTILE.replace(",", ".")
    slurm = {"job_name": name, "partition": name, "options": [f"--comment={name}"], "modules": [name]}
    slurm |= {"container": ["box", name], "srun": [f"--chdir={name}"]}
    site = tmp_path / "site/slurm/mine.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(json.dumps(slurm | {"environment": {"SEEN": name}}))
    more = ["--config-dir", str(tmp_path / "site"), "+slurm=mine", f"logging.wandb.project={HOSTILE}"]
    assert call(submit, *more, *words, f"run_dir={run}") == 0
    ((path, script),) = sbatch()
    assert load(Path(path).with_name("config.json")).logging.wandb.project == HOSTILE
    options = options_of(script)
    assert options["job-name"] == options["partition"] == options["comment"] == name
    assert options["output"] == f"{Path(path).parent}/%j.log".replace("%A #", "%%A #")
    # The script itself, with what it calls replaced by programs that note their words.
    (tmp_path / "bin/bash").write_text('#!/bin/sh\nprintf \'%s\\0\' "$SEEN" "$@"\n')
    (tmp_path / "bin/bash").chmod(0o755)
    module = f'module() {{ printf "%s\\0" "$@"; }}\n{script}'
    done = subprocess.run(["/bin/bash", "-c", module], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    train = str(ROOT / "launch/train.sbatch")
    wanted = ["load", name, name, train, f"--srun=--chdir={name}", "--container=box", f"--container={name}"]
    assert done.stdout.split("\0")[:-1] == [*wanted, f"run_dir={run}"]


@pytest.mark.parametrize("path", ["/a/b", "/a,b", "/it's", "/it's, b", '/a, "b"', HOSTILE])
def test_a_run_folder_is_read_as_it_was_written(path):
    (word,) = CommandLine.parse(SubmitConfig, "submit", [override("run_dir", path)]).overrides
    assert OverridesParser.create().parse_override(word).value() == path


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run_dir=a\\b", "run_dir='a\\\\b': train.sbatch takes no backslash"),
        ("""run_dir='/x,"b",\\'c\\''""", """run_dir=/x,"b",'c': with a comma and both kinds of quotes it reads as a"""),
        ("slurm.partition='a\nb'", "slurm.partition='a\\nb': a backslash or a control character"),
        ("slurm.options=['--nodes=4']", "slurm.options: '--nodes=4' is written by nodes"),
        ("slurm.options=[-N4]", "slurm.options: '-N4' must be a long option"),
        ("slurm.srun=[bash]", "slurm.srun: 'bash' must be an option of srun"),
        ("+slurm.environment.a-b=1", "slurm.environment: 'a-b' is no name of a variable"),
        ("slurm.time=tomorrow", "slurm.time='tomorrow' is no time limit"),
        ("slurm.time=1:30", "slurm.time=1:30 must be longer than slurm.grace_s=120 s"),
        (
            "slurm.job_name=${oc.env:DOOR}",
            "slurm.job_name=${oc.env:DOOR}: a secret in it would stand in the job's script",
        ),
        (
            "logging.wandb.entity=c0ffee-c0ffee",
            "logging.wandb.entity=***: holds the value of the environment variable KEY",
        ),
        ("cluster.name=x://me:pw@host/", "cluster.name=x://***@host/: its credentials would"),
        ("slurm.processes_per_node=16", "slurm.processes_per_node=16 is above cluster.gpus_per_node=8"),
        ("slurm.chain=1001", "slurm.chain=1001 must be from 0 to 1000"),
        (
            "cluster=a100_80g engine.products=fp8",
            "cluster=a100_80g has no cluster.fp8_tflops, the rate of their fp8 products: set that rate, or engine.prod",
        ),
        ("slurm.tokens=99999999", "slurm.tokens=99999999 is above the 12800 tokens of schedule.steps=50 steps"),
        ("cluster.gpu_memory_gib=1.5", "a rank needs 1.5 GiB, but cluster.gpu_memory_gib=1.5"),
        ("data.manifest=nowhere.json", "data.manifest=nowhere.json: No such file"),
        ("init_from=nowhere", "init_from=nowhere: no checkpoint, run or released model is there"),
        ("checkpoint.resume=40", "checkpoint.resume=40 does not exist; run_dir=run has steps: none"),
        ("model.vocab_size=300", "model.vocab_size=300 is smaller than the 401 entries of the tokenizer"),
        ("slurm.tim=3", "unknown setting slurm.tim; did you mean slurm.time"),
    ],
    ids=lambda value: value.partition("=")[0] if "=" in value else None,
)
def test_what_is_refused(sbatch, words, capsys, monkeypatch, word, message):
    """Together with another problem, unless it is told only without one: all are told at once."""
    monkeypatch.setenv("KEY", "c0ffee-c0ffee")
    monkeypatch.setenv("DOOR", "mellon-mellon")
    alone = ("slurm.tim=", "slurm.time=", "slurm.tokens=", "cluster.gpu_memory_gib=")
    other = [] if word.startswith(alone) else ["data.micro_batch=3"]
    given = [*words, "cluster=h200_141g", "data.global_batch=8", "run_dir=run", *word.split(" "), *other]
    assert call(submit, *given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not other or "data.micro_batch=3" in said
    assert not any(secret in said for secret in ("c0ffee", "mellon", "pw@"))
    assert not sbatch()
    assert not Path("run").exists()


def test_a_server_that_does_not_answer_is_told_soon(sbatch, words, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr("data_pipeline.shards.remote.time.sleep", waits.append)
    urls = ["data.manifest=https://127.0.0.1:1/m.json", "evaluation.manifest=https://127.0.0.1:1/e.json"]
    assert call(submit, *words, "run_dir=run", *urls) == 2
    said = capsys.readouterr().err
    assert "error: data.manifest=https://127.0.0.1:1/m.json: " in said
    assert "error: evaluation.manifest=https://127.0.0.1:1/e.json: " in said
    assert sum(waits) < 10


def test_a_sweep_is_one_job_array_with_a_folder_for_each_run(sbatch, words, tmp_path, capsys):
    sweep = tmp_path / HOSTILE.replace(",", "")
    more = ["--multirun", "optim.lr=1e-2,2e-2", "seed=0,1", "slurm.at_once=2", "slurm.chain=2"]
    assert call(submit, *words, *more, f"run_dir='{sweep}'".replace("it's", "its")) == 0
    sweep = Path(str(sweep).replace("it's", "its"))
    first, second = sbatch()
    script = first[-1]
    assert options_of(script)["array"] == "0-3%2"
    assert options_of(script)["job-name"] == sweep.name
    assert options_of(script)["output"].endswith("/%A_%a.log")
    assert second[0] == "--dependency=afterany:17"
    (submission,) = Submission.all_of(RunFolder(sweep))
    runs = submission.read()["runs"]
    assert [Path(run).parent for run in runs] == [sweep] * 4
    (tmp_path / "bin/bash").write_text(f'#!/bin/sh\nprintf "%s\\0" "${SUBMITTED}" "$2"\n')
    (tmp_path / "bin/bash").chmod(0o755)
    for task, run in enumerate(runs):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(task)}
        done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True)
        settings, word = done.stdout.split("\0")[:-1]
        assert word == f"run_dir={run}"
        config = load(Path(settings))
        assert (config.optim.lr, config.seed) == ([1e-2, 2e-2][task // 2], task % 2)
    assert call(submit, "--multirun", "nodes=1,2", *words, "run_dir=other") == 2
    assert "a sweep is one job array, whose tasks share nodes" in capsys.readouterr().err
    assert call(submit, *words, "run_dir=other", "hydra/launcher=submitit_slurm") == 2


def test_a_chain_lasts_until_its_budget(sbatch, words, tmp_path, monkeypatch, capsys):
    more = ["slurm.chain=3", "slurm.tokens=1000", f"run_dir={tmp_path}/run", "slurm.requeue=false"]
    assert call(submit, *words, *more) == 0
    calls = sbatch()
    assert [call[0] for call in calls[1:]] == ["--dependency=afterany:17", "--dependency=afterany:17:18"]
    (submission,) = Submission.all_of(RunFolder(tmp_path / "run"))
    assert load(submission.config_file).last_step == 8  # of 128 tokens each
    assert f"MEGATRON_TN_CHAIN={submission.name}" in calls[0][-1]
    assert "no-requeue" in options_of(calls[0][-1])
    monkeypatch.setenv("SBATCH_FAILS", "7")
    assert call(submit, "--comment=mine", "--", *words, *more, "slurm.dependency=singleton") == 7
    assert sbatch()[-1][:2] == ["--dependency=singleton", "--comment=mine"]
    assert call(submit, *words, *more, "checkpoint.resume=none") == 2
    assert "every job of the chain would go back to it" in capsys.readouterr().err


def test_time_and_disk(sbatch, words, tmp_path, monkeypatch, capsys):
    assert call(submit, *words, f"run_dir={tmp_path}/run", "dry_run=true") == 0
    (submission,) = Submission.all_of(RunFolder(tmp_path / "run"))
    cluster = ClusterConfig(name="slow", gpus_per_node=2, bf16_tflops=2e-7)
    base = SubmitConfig(**vars(load(submission.config_file)) | {"cluster": cluster})
    hours = check(base).seconds / 3600
    assert hours > 1
    chain = check(dataclasses.replace(base, slurm=SlurmConfig(chain=0, time="60")))
    assert chain.problems == []
    assert chain.config.slurm.chain == pytest.approx(hours * 60 / 58, abs=1)
    short = check(dataclasses.replace(base, slurm=SlurmConfig(time="30", requeue=False)))
    assert "slurm.time=30 and slurm.chain=1 with slurm.requeue=false are 0.5 h of training" in short.problems[0]
    (long,) = check(dataclasses.replace(base, slurm=SlurmConfig(chain=0, time="2:01"))).problems
    assert "slurm.chain=0 with slurm.time=2:01 is " in long
    assert "above 1000: raise slurm.time" in long
    unknown = dataclasses.replace(base, cluster=ClusterConfig(), slurm=SlurmConfig(chain=0))
    assert "slurm.chain=0 needs cluster.bf16_tflops" in check(unknown).problems[0]
    wide = dataclasses.replace(base, parallel=ParallelConfig(tp=4), nodes=2)
    assert any("parallel.tp=4 crosses nodes of cluster.gpus_per_node=2" in note for note in check(wide).notes)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=3 * 12 * 32_320))
    (full,) = disk_problems([check(base)])
    assert "run has 0.0 GiB free, but 4 checkpoints of 0.0 GiB (checkpoint.keep=3, and the one being written)" in full
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=7 * 12 * 32_320))
    assert disk_problems([check(base)]) == []
    sweep = ["--multirun", "seed=0,1", f"run_dir={tmp_path}/sweep"]
    assert call(submit, *words, *sweep) == 2
    assert "/sweep/0_seed-0 and 1 runs more have 0.0 GiB free, but 4 checkpoints of" in capsys.readouterr().err
    (tmp_path / "sweep/0_seed-0").mkdir(parents=True)
    (tmp_path / "sweep/0_seed-0/submitted").touch()
    assert call(submit, *words, *sweep, "dry_run=true") == 2
    assert re.search("error: .*sweep/0_seed-0/submitted/.*: Not a directory", capsys.readouterr().err)
    (tmp_path / "sweep/0_seed-0/submitted").unlink()
    assert call(submit, *words, *sweep, "dry_run=true") == 0
    assert "note: run_dir=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("12:30:00", 45000), ("2-0", 172800), ("1-02:30", 95400), ("1-00:00:01", 86401)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert SlurmConfig(time=text).seconds == seconds
