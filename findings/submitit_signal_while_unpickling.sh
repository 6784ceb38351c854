#!/usr/bin/env bash
# submitit 1.5.4: a job (submitit.core._submit) unpickles its function before it installs its handler for the signal that
# means a preemption or the near time limit. Whatever the function's module imports is imported then, torch for instance,
# for seconds or, from a busy file system, minutes. A signal in that time ends the process by its default action: the job
# has failed, leaves no result, and is not requeued, however many time-outs are allowed.
#
# Guessed: submitit's handler is there as soon as the job has begun, and a signal at any time requeues it.
# Seen, for a module that takes 3 s to import, with SIGUSR2 while it is imported and after it:
#   signal while the module is imported: ended by SIGUSR2, no result
#   signal while the function runs: requeued job 17
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check submitit==1.5.4
cd "$folder"
cat >slow.py <<'END'
import time
from pathlib import Path

Path("importing").touch()
time.sleep(3)


class Work:
    def __call__(self):
        Path("running").touch()
        time.sleep(3)

    def checkpoint(self):
        import submitit

        return submitit.helpers.DelayedSubmission(self)
END
mkdir bin
printf '#!/bin/sh\necho "$@" >requeued\n' >bin/scontrol
chmod +x bin/scontrol
PATH="$folder/bin:$PATH" "$folder/venv/bin/python" - <<'END'
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from submitit.core.utils import DelayedSubmission, JobPaths
from slow import Work

SLURM = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}


def signalled(moment):
    """What becomes of a job that gets the signal once the file `moment` is there."""
    for name in ("importing", "running", "requeued"):
        Path(name).unlink(missing_ok=True)
    job = DelayedSubmission(Work())
    job.set_timeout(60, 3)
    job.dump(JobPaths(Path.cwd(), "17").submitted_pickle)
    command = [sys.executable, "-m", "submitit.core._submit", "."]
    process = subprocess.Popen(command, env=os.environ | SLURM, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Path(moment).exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    code = process.wait()
    if Path("requeued").exists():
        return "requeued job " + Path("requeued").read_text().split()[-1]
    result = "a result" if JobPaths(Path.cwd(), "17").result_pickle.exists() else "no result"
    return f"ended by {signal.Signals(-code).name}, {result}" if code < 0 else f"exit code {code}, {result}"


found = [signalled("importing"), signalled("running")]
print(f"signal while the module is imported: {found[0]}\nsignal while the function runs: {found[1]}")
sys.exit(found != ["ended by SIGUSR2, no result", "requeued job 17"])
END
