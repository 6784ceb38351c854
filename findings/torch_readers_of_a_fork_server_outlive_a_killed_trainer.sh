#!/usr/bin/env bash
# torch 2.13.0 (CPU), DataLoader with reader processes.
#
# Behaviour: a reader process (num_workers=1) watches whether its parent process lives, and ends within 5 s of its end.
# Under the start method "forkserver", the default of Python 3.14 on Linux, the parent is the fork server, which lives as
# long as one of its children does. So after a kill -9 of the process that iterates, readers and fork server stay for
# ever, with their memory and open files; under "fork" and "spawn" they end.
#
# Guess that was wrong: readers end with the process that iterates, whatever the start method.
#
# Output seen:
#   fork: no reader is left 15 s after the kill
#   spawn: no reader is left 15 s after the kill
#   forkserver: the reader lives 15 s after the kill
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/iterate.py" <<'PYTHON'
import multiprocessing
import os
import signal
import sys

from torch.utils.data import DataLoader

if __name__ == "__main__":
    loader = DataLoader(range(10**6), batch_size=None, num_workers=1, multiprocessing_context=sys.argv[1])
    steps = iter(loader)
    next(steps)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
PYTHON
"$folder/venv/bin/python" - "$folder/iterate.py" <<'PYTHON'
import os
import signal
import subprocess
import sys
import time

lives = {}
for method in ("fork", "spawn", "forkserver"):
    with subprocess.Popen([sys.executable, sys.argv[1], method], stdout=subprocess.PIPE, text=True) as trainer:
        reader = int(trainer.stdout.readline())
    time.sleep(15)
    try:
        os.kill(reader, 0)
        lives[method] = True
    except OSError:
        lives[method] = False
    print(f"{method}: {'the reader lives' if lives[method] else 'no reader is left'} 15 s after the kill")
    if lives[method]:
        os.kill(reader, signal.SIGKILL)
raise SystemExit(lives != {"fork": False, "spawn": False, "forkserver": True})
PYTHON
