#!/usr/bin/env bash
# hydra-submitit-launcher 1.2.0 with submitit 1.5.4 and hydra-core 1.3.8: a run of a sweep that raises an exception is a
# success for submitit, and so for SLURM. Hydra's run_job catches the exception and returns it, submitit writes that as
# the result of a job that succeeded, logs "Job completed successfully" and exits with 0. The traceback is in no file of the
# job: the command that launched the sweep alone shows it, if it is still alive, and of several that fail the first's.
#
# Guessed: the job's log has the traceback, and the job has failed.
# Seen, for runs x=1 and x=2 that raise ValueError, and x=3 that does not:
#   jobs: 3 of 3 are successes by their logs and results; tracebacks in their logs: 0
#   command: exit code 1, names x=1: True, names x=2: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check submitit==1.5.4 hydra-core==1.3.8 hydra-submitit-launcher==1.2.0
cd "$folder"
mkdir conf
echo 'x: 0' >conf/config.yaml
cat >app.py <<'END'
import hydra


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config):
    if config.x < 3:
        raise ValueError(f"x={config.x} does not work")


main()
END
"$folder/venv/bin/python" - <<'END'
import pickle
import subprocess
import sys
from pathlib import Path

command = [sys.executable, "app.py", "--multirun", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "x=1,2,3"]
done = subprocess.run(command, capture_output=True, text=True)
logs = [path.read_text() for path in Path("sweep/.submitit").glob("*/*_log.*")]
results = [pickle.loads(path.read_bytes())[0] for path in Path("sweep/.submitit").glob("*/*_result.pkl")]
successes = min(sum("Job completed successfully" in log for log in logs), results.count("success"))
print(f"jobs: {successes} of {len(results)} are successes by their logs and results;", end=" ")
tracebacks = sum("ValueError" in log for log in logs)
print(f"tracebacks in their logs: {tracebacks}")
named = [f"ValueError: x={x} does not work" in done.stderr for x in (1, 2)]
print(f"command: exit code {done.returncode}, names x=1: {named[0]}, names x=2: {named[1]}")
sys.exit((successes, len(results), tracebacks, done.returncode, named) != (3, 3, 0, 1, [True, False]))
END
