"""Sweeps with hydra/launcher=submitit_slurm (the extra submitit), so that a job saves and is requeued.

submitit sends a job SIGUSR2 ahead of its time limit, and requeues it at once, without a checkpoint. Its handler takes
any such signal for a time-out once min(0.8 T, T - 10 minutes) of a time limit T have passed, so in a job of ten minutes
or less also a preemption in its first second; and hydra's launcher allows no time-out (max_num_timeout=0): the job is
given up. Here the signal is SIGUSR1, which the trainer takes (training/preemption.py): it saves, stops, and then calls
submitit's handler; and time-outs are allowed. Before a job has unpickled its function there is no handler, and the
signal ends it for good: so the pickle imports little (`program._Program`).
"""

import atexit
import contextlib
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

from hydra.errors import CompactHydraException

from megatron_tn.config import ConfigError, redacted

LAUNCHERS = ("hydra/launcher=submitit_slurm", "hydra/launcher=submitit_local")
TIMEOUTS = "hydra.launcher.max_num_timeout"
MOST = 100  # time-outs of a job that goes on from its checkpoints each time; the command line may say another number


class JobFailed(CompactHydraException):
    """A job that has told why it ended; of this kind Hydra prints no traceback."""


def settings_for_submitit(words: Sequence[str]) -> list[str]:
    """What to add to the overrides `words`; nothing where they do not choose submitit. Names the signal for submitit in
    the environment, which its jobs inherit, and unblocks the signals that end this process.

    Raises:
        ConfigError: the launcher is chosen and not installed.
    """
    chosen = [word for word in words if word in LAUNCHERS]
    if not chosen:
        return []
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(f"{chosen[0]} needs the extra submitit: pip install --no-build-isolation -e '.[submitit]'")
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    # Blocked for a training run that does not come in this process: it waits for its jobs, until a signal ends it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    added = {"hydra.launcher.name": "megatron_tn"}  # hydra's is that of this file
    if chosen[0] == LAUNCHERS[0]:
        added[TIMEOUTS] = str(MOST)
    said = {word.lstrip("+").partition("=")[0] for word in words}
    return [f"{name}={value}" for name, value in added.items() if name not in said]


@contextlib.contextmanager
def failure_is_told() -> Iterator[None]:
    """In a job of submitit, a failed run, and one that was told to stop by another signal than submitit's, become an
    error, which ends the sweep's command: SystemExit would end the job without a result, and where sacct does not work
    the command would wait for one for ever. Other errors go into the job's log; Hydra would hand them to the command
    alone.

    For submitit an error is a result like others, and it ends the job's process with 0, COMPLETED for SLURM: so the
    process ends with 1 here, or the run's own exit code, when the result is written."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        yield
        return
    failed: list[int] = []
    atexit.register(_end_if, failed)  # before the program's imports register theirs, and so called after those
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.code, int) or stop.code < 0:
            raise  # submitit requeues the job
        from submitit import JobEnvironment

        failed.append(stop.code or 1)
        why = f"{JobEnvironment().paths.stderr} says why" if stop.code else "told to stop; the same command goes on"
        raise JobFailed(f"exit code {failed[0]}: {why}") from None
    except Exception as error:
        failed.append(1)
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
        raise


def _end_if(failed: list[int]) -> None:
    """End the process with the first exit code of `failed`, where there is one."""
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed[0])
