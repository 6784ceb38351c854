#!/usr/bin/env bash
# torch 2.13.0 (CPU), torchrun.
#
# Behaviour: `torchrun --shutdown-timeout S` is "time in seconds to wait for graceful shutdown of workers before sending
# SIGKILL". It holds where torchrun itself is told to stop. When a worker fails, the others get SIGTERM as well, and
# SIGKILL 30 s later whatever S is: LocalElasticAgent._stop_workers calls _shutdown() with its default.
#
# Guess that was wrong: S is how long a worker has after SIGTERM, whatever the reason, so a checkpoint that takes 100 s
# can be finished with S=120, and a worker that hangs is gone after 5 s with S=5.
#
# Output seen (seconds from a worker's SIGTERM to its end, with S=5):
#   torchrun was told to stop: 5
#   another worker failed: 30
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat >"$folder/worker.py" <<'PYTHON'
import os
import pathlib
import signal
import sys
import time

folder = pathlib.Path(__file__).parent
if os.environ["RANK"] == "1" and sys.argv[1] == "fails":
    while not (folder / "alive").exists():
        time.sleep(0.1)
    sys.exit(1)
signal.signal(signal.SIGTERM, lambda *_: (folder / "told").touch())
while True:  # a worker that is busy with something after SIGTERM, and lets a file tell that it lives
    (folder / "alive").touch()
    time.sleep(0.1)
PYTHON
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import pathlib
import subprocess
import sys
import time

folder, found = pathlib.Path(sys.argv[1]), {}
for how, words in (("told", "torchrun was told to stop"), ("fails", "another worker failed")):
    for name in ("alive", "told"):
        (folder / name).unlink(missing_ok=True)
    command = [f"{folder}/venv/bin/torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    command += ["--shutdown-timeout=5", f"{folder}/worker.py", how]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as torchrun:
        while not (folder / "alive").exists():
            time.sleep(0.1)
        if how == "told":
            time.sleep(2)
            torchrun.terminate()
        torchrun.wait(100)
    seconds = (folder / "alive").stat().st_mtime - (folder / "told").stat().st_mtime
    found[how] = 5 * round(seconds / 5)
    print(f"{words}: {found[how]}")
raise SystemExit(found != {"told": 5, "fails": 30})
PYTHON
