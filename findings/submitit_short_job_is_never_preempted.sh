#!/usr/bin/env bash
# submitit 1.5.4 with hydra-submitit-launcher 1.2.0: in a job whose time limit is ten minutes or less every signal is a
# time-out, also one that comes at once, as a preemption does. SignalHandler.has_timed_out compares the time that has passed
# with min(0.8 T, T - 10 minutes) of a limit T, and hydra's launcher allows no time-out, so the job is given up.
#
# Guessed: the limit matters near its end; a job that is signalled at its start was preempted, and is requeued.
# Seen, for a signal right after the start:
#   time limit 5 min, signal after 0 s: Job not requeued because: timed-out too many times.
#   time limit 10 min, signal after 0 s: Job not requeued because: timed-out too many times.
#   time limit 11 min, signal after 0 s: requeued
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check submitit==1.5.4 hydra-core==1.3.8 hydra-submitit-launcher==1.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import logging
import sys
from pathlib import Path

from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from submitit.core.job_environment import SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths, UncompletedJobError

logging.disable(logging.CRITICAL)


class Work:
    def __call__(self):
        return 0

    def checkpoint(self):
        return DelayedSubmission(self)


class Environment:
    global_rank = 0
    requeued = False

    def _requeue(self, countdown):
        self.requeued = True


def preempted_at_once(minutes):
    """What becomes of a job of so many minutes that is signalled right after its start."""
    job, environment = DelayedSubmission(Work()), Environment()
    job.set_timeout(minutes, SlurmQueueConf().max_num_timeout)
    handler = SignalHandler(environment, JobPaths(Path.cwd(), "1"), job)
    handler._exit = lambda: None
    try:
        handler.checkpoint_and_try_requeue(10)
    except UncompletedJobError as error:
        return str(error)
    return "requeued" if environment.requeued else "nothing"


found = {minutes: preempted_at_once(minutes) for minutes in (5, 10, 11)}
for minutes, what in found.items():
    print(f"time limit {minutes} min, signal after 0 s: {what}")
given_up = "Job not requeued because: timed-out too many times."
sys.exit(found != {5: given_up, 10: given_up, 11: "requeued"})
END
