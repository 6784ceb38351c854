"""What a sweep with hydra/launcher=submitit_slurm is given; tests/slurm/test_submitit.py runs one."""

import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hydra._internal.utils import run_and_report

from megatron_tn import evaluate
from megatron_tn import train as module
from megatron_tn.cli.program import _Program
from megatron_tn.cli.submitit import MOST, JobFailed, failure_is_told, settings_for_submitit
from megatron_tn.config import ConfigError, EvaluateConfig
from megatron_tn.train import main as train
from megatron_tn.training.preemption import HELD, hold_signals
from tests.helpers.training import ROOT, call

CHOSEN = "hydra/launcher=submitit_slurm"


@pytest.fixture
def submitit(monkeypatch):
    """As if the extra were installed."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")
    monkeypatch.delenv("SUBMITIT_PREEMPT_SIGNAL")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_a_job_may_time_out_and_is_signalled_as_the_trainer_listens(submitit):
    assert settings_for_submitit(["model=demo"]) == []
    assert "SUBMITIT_PREEMPT_SIGNAL" not in os.environ
    name = "hydra.launcher.name=megatron_tn"
    hold_signals()
    assert settings_for_submitit([CHOSEN, "model=demo"]) == [name, f"hydra.launcher.max_num_timeout={MOST}"]
    assert os.environ["SUBMITIT_PREEMPT_SIGNAL"] == "USR1"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {*HELD}  # of this process, which waits for its jobs
    assert settings_for_submitit([CHOSEN, "hydra.launcher.max_num_timeout=3"]) == [name]
    assert settings_for_submitit(["hydra/launcher=submitit_local", "hydra.launcher.name=mine"]) == []


def test_what_a_job_unpickles_before_it_listens_for_signals_imports_no_torch():
    """Also after the requeue, for which submitit pickles it again."""
    script = """if True:
        import pickle, sys
        program = pickle.loads(sys.stdin.buffer.read())
        assert pickle.loads(pickle.dumps(program)) == program
        print(program.module, program.name, "torch" in sys.modules)"""
    pickled = pickle.dumps(_Program(module.train))
    done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, cwd=ROOT)
    assert done.stdout == b"megatron_tn.train train False\n", done.stderr


def test_a_job_calls_the_function_of_a_decorated_command():
    """A module has the command line, without parameters, by the name of a function that is decorated."""
    program = pickle.loads(pickle.dumps(_Program(evaluate.main.__wrapped__)))
    with pytest.raises(ConfigError, match="checkpoint is not set"):
        program(EvaluateConfig())


@pytest.mark.parametrize(
    ("code", "kind", "said", "ends"),
    [
        (2, JobFailed, "exit code 2: sweep/.submitit/17_0/log.err says why", [2]),
        (0, JobFailed, "exit code 1: told to stop", [1]),  # by SIGTERM, after its save
        (-1, SystemExit, "-1", []),  # submitit requeues it
    ],
)
def test_a_job_that_fails_has_a_result_and_one_that_is_requeued_has_none(monkeypatch, capsys, code, kind, said, ends):
    ended = []
    monkeypatch.setattr("atexit.register", lambda end, failed: ended.append(failed))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    there = SimpleNamespace(paths=SimpleNamespace(stderr="sweep/.submitit/17_0/log.err"))
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(JobEnvironment=lambda: there))
    with pytest.raises(kind, match=said) as failed, failure_is_told():
        sys.exit(code)

    def in_the_sweeps_command():
        raise pickle.loads(pickle.dumps(failed.value))

    with pytest.raises(SystemExit):
        run_and_report(in_the_sweeps_command)
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="odd"), failure_is_told():
        raise ValueError("odd")
    assert capsys.readouterr().err.endswith("ValueError: odd\n")
    with failure_is_told():
        pass
    assert ended == [ends, [1], []]


def test_a_job_that_fails_ends_with_its_exit_code_when_its_result_is_written():
    script = """if True:
        import contextlib
        from megatron_tn.cli.submitit import failure_is_told
        with contextlib.suppress(ValueError), failure_is_told():
            raise ValueError("odd")
        print("the result is written")"""
    job = os.environ | {"SUBMITIT_EXECUTOR": "slurm"}
    done = subprocess.run([sys.executable, "-c", script], env=job, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "the result is written\n")


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(train, "--multirun", "seed=0,1", CHOSEN) == 2
    assert f"error: {CHOSEN} needs the extra submitit: pip install" in capsys.readouterr().err
