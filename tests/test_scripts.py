"""Names with the shell's characters in everything that becomes a script or its arguments: nothing of them is run."""

import os
import shlex
import subprocess

import pytest

from data_pipeline.config import compose
from data_pipeline.errors import InputError
from data_pipeline.run import check, run
from tests.data_pipeline.corpus import prose
from tests.helpers.training import ROOT

HOSTILE = """it's a "run" $(touch marker) `touch marker`; touch marker &|<>*? =,[x] %A #"""
RECORD = """#!/bin/bash
printf '%s\\0' "$@" >>"$0.words"
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """fakes(NAME): the words of each call of this program, which does nothing, joined."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol", "launch_pickled_pipeline"):
        (folder / name).write_text(RECORD + f"cat '{folder}/{name}.says' 2>/dev/null || :\n")
        (folder / name).chmod(0o755)
    (folder / "sbatch.says").write_text("Submitted batch job 17\n")
    (folder / "scontrol.says").write_text(f"   Command={ROOT}/launch/train.sbatch\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    yield lambda name: (folder / f"{name}.words").read_text().split("\0")[:-1]
    assert not list(tmp_path.rglob("marker"))


def test_the_script_of_a_stage(fakes, tmp_path):
    source = tmp_path / f"in {HOSTILE}"
    source.mkdir()
    (source / "a.txt").write_text(prose(1))
    output = tmp_path / HOSTILE
    name = "a b$(touch marker)`touch marker`"
    words = ["pipeline=text", f"input={source}", f"output={output}", "tasks=1", "executor=slurm", "slurm.wait=false"]
    words += [f"slurm.partition={name}", f"slurm.job_name={name}", f"slurm.sbatch_args={{comment: '{name}'}}"]
    words += [f"slurm.srun_args={{chdir: '{name}'}}", "slurm.env_command='export SEEN=1'", "tokenizer.vocab_size=400"]
    assert run(compose(words)) is None
    script = next(output.glob("work/stages/00_rules/launch_script.slurm"))
    # sbatch reads quotes of its lines as a shell does.
    options = [shlex.split(line)[1:] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert all(len(option) == 1 for option in options)
    values = dict(option[0].removeprefix("--").partition("=")[::2] for option in options)
    assert values["partition"] == values["comment"] == name
    assert values["job-name"] == f"{name}_rules"
    assert values["output"] == f"{script.parent}/slurm_logs/%A_%a.out".replace("%A #", "%%A #")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = [f"--chdir={name}", "-l", "-n", "1", "launch_pickled_pipeline", str(script.with_name("executor.pik"))]
    assert fakes("srun") == wanted


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("slurm.job_name='a\nb'", "slurm.job_name='a\\nb': a backslash or a control character"),
        ("slurm.sbatch_args={comment: 'a\nb'}", "slurm.sbatch_args.comment='comment=a\\nb': a backslash or"),
        ("output='a\\b'", "output='a\\\\b': a backslash or"),
        ("slurm.env_command='export X=${oc.env:PATH}'", "slurm.env_command: write $NAME for ${oc.env:NAME}"),
        ("input=memory://me:pw@host", "sources.main.path=memory://***@host: with executor=slurm its credentials"),
    ],
)
def test_what_cannot_stand_in_a_script_is_refused(fakes, tmp_path, word, message):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text(prose(1))
    words = ["pipeline=text", f"input={source}", "output=out", "executor=slurm", "slurm.partition=cpu", word]
    with pytest.raises(InputError) as refused:
        check(compose(words))
    assert [problem for problem in refused.value.problems if problem.startswith(message)]


def sbatch(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """launch/train.sbatch as SLURM would run it."""
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    command = ["bash", str(ROOT / "launch/train.sbatch"), *words]
    return subprocess.run(command, env=os.environ | slurm | environment, capture_output=True, text=True)


@pytest.mark.parametrize("written", ["{}", "'{}'", '"{}"'], ids=["plain", "single quotes", "double quotes"])
def test_the_job_of_a_run(fakes, tmp_path, written):
    name = HOSTILE if written == "{}" else HOSTILE.replace("'", "").replace('"', "")
    word = f"run_dir={written.format(tmp_path / name)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "status.json").write_text('{"state": "preempted", "step": "$(touch marker)"}')
    done = sbatch("model=$(touch marker)", word)
    assert done.returncode == 0, done.stderr
    words = fakes("srun")
    assert words[-2:] == ["model=$(touch marker)", word]
    assert (tmp_path / name / "requeues.log").exists()
    assert fakes("scontrol")[-2:] == ["requeue", "17"]


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CPUS_ON_NODE", "NPROC_PER_NODE"])
def test_numbers_of_slurm_are_numbers(fakes, tmp_path, name):
    done = sbatch(f"run_dir={tmp_path}", **{name: "a[$(touch marker)]", "OMP_NUM_THREADS": ""})
    assert done.returncode == (0 if name == "SLURM_CPUS_ON_NODE" else 2)
    assert done.returncode == 0 or name in done.stderr


def test_a_name_that_the_script_would_read_otherwise_is_refused(fakes, tmp_path):
    done = sbatch(r"run_dir='a\'b'")
    assert (done.returncode, "a backslash" in done.stderr) == (2, True)


def test_options_before_the_overrides_are_sruns_and_the_containers(fakes, tmp_path):
    name = "$(touch marker) `touch marker`"
    done = sbatch(f"--srun=--container-image={name}", "--container=run", f"--container={name}", f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    words = fakes("srun")
    assert words[words.index(f"--container-image={name}") + 1 :][:3] == ["run", name, "bash"]
    assert words[-2:] == ["--", f"run_dir={tmp_path}"]


def test_a_preemption_by_slurm_is_no_cancellation(fakes, tmp_path):
    """SLURM sends SIGTERM for both; node.sh has left word of it."""
    (tmp_path / "status.json").write_text('{"state": "preempted", "step": 3}')
    folder = tmp_path / "bin"
    (folder / "srun").write_text('#!/bin/bash\n: >"$RUN_MARK.terminated"\n')
    assert "cancelled, so not requeued" in sbatch(f"run_dir={tmp_path}").stdout
    (folder / "scontrol.says").write_text(
        "   PreemptEligibleTime=2026-11-29T20:00:00 PreemptTime=2026-11-29T20:00:10\n"
    )
    assert "told to stop: requeueing" in sbatch(f"run_dir={tmp_path}").stdout
    assert fakes("scontrol")[-2:] == ["requeue", "17"]


@pytest.mark.parametrize(
    ("marks", "state", "requeued"),
    [
        ("failed terminated", "", True),
        ("terminated failed", "", False),
        ("failed", "JobState=COMPLETING Reason=None", False),
        ("terminated failed", "JobState=COMPLETING Reason=TimeLimit", True),
    ],
    ids=["srun ends the other nodes", "told to stop", "scancel", "time limit in the middle of a save"],
)
def test_a_cancellation_is_told_from_a_failure_on_one_node(fakes, tmp_path, marks, state, requeued):
    lines = "".join(f'echo 137 >"$RUN_MARK.{mark}"; sleep 0.02\n' for mark in marks.split())
    (tmp_path / "bin/srun").write_text(f"#!/bin/bash\n{lines}exit 137\n")
    (tmp_path / "bin/scontrol.says").write_text(f"   {state}\n   Command={ROOT}/launch/train.sbatch\n")
    done = sbatch(f"run_dir={tmp_path}")
    assert (done.returncode, fakes("scontrol")[-2:] == ["requeue", "17"]) == (0 if requeued else 137, requeued)


@pytest.mark.parametrize(("said", "job"), [("JobId=17 ArrayJobId=17", "17_2"), ("JobId=16 ArrayJobId=17", "17")])
def test_a_task_of_a_job_array_requeues_itself_alone(fakes, tmp_path, said, job):
    """17 is all tasks of the array. A job that another array's task submitted has that one's variables."""
    (tmp_path / "bin/srun").write_text("#!/bin/bash\nexit 75\n")
    (tmp_path / "bin/scontrol.says").write_text(f"{said} JobName=x\n   Command={ROOT}/launch/train.sbatch\n")
    done = sbatch(f"run_dir={tmp_path}", SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="2")
    assert (done.returncode, fakes("scontrol")[-2:]) == (0, ["requeue", job])


def test_a_job_that_fails_is_requeued_and_ends_with_its_code(fakes, tmp_path):
    (tmp_path / "bin/srun").write_text("#!/bin/bash\nexit 75\n")
    environment = {"MEGATRON_TN_FAILURES": "1"}
    done = sbatch(f"run_dir={tmp_path}", **environment)
    assert (done.returncode, fakes("scontrol")[-2:]) == (0, ["requeue", "17"])
    done = sbatch(f"run_dir={tmp_path}", SLURM_RESTART_COUNT="1", **environment)
    assert (done.returncode, "a hang (exit code 75): requeued 1 times" in done.stdout) == (75, True)
    done = sbatch(f"run_dir={tmp_path}", MEGATRON_TN_REQUEUE="no")
    assert (done.returncode, "not requeued" in done.stdout) == (75, True)
