#!/usr/bin/env bash
# torch 2.13.0, its CPU build: each gloo process group, even one of this rank alone that never communicates, has a thread that
# wakes about 90 times a second. 200 groups take a seventh of a core, and processes with a thousand groups starve a machine.
#
# Guessed: a process group that is not used costs nothing, so a library may make one for each object that asks for it.
# Seen: 201 threads for 201 groups; each woke 86 times a second; 0.56 s of CPU in 4 s of sleep
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import time
from pathlib import Path

import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
groups = [dist.group.WORLD, *(dist.new_group([0]) for _ in range(200))]
time.sleep(2)  # a thread names itself once it runs
threads = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().startswith("gloo")]


def wakes() -> int:
    lines = (line for task in threads for line in (task / "status").read_text().splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


before, busy, began = wakes(), time.process_time(), time.monotonic()
time.sleep(4)
each = (wakes() - before) / len(threads) / (time.monotonic() - began)
busy = time.process_time() - busy
print(f"{len(threads)} threads for {len(groups)} groups; each woke {each:.0f} times a second; {busy:.2f} s of CPU in 4 s of sleep")
raise SystemExit(not (len(threads) == len(groups) and each > 30))
PYTHON
