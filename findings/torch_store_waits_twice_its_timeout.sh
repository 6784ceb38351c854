#!/usr/bin/env bash
# torch 2.13.0, its CPU build: a client of TCPStore that meets nobody at the address within its timeout waits a random time,
# about as long, and tries again before it gives up. Ranks whose rank 0 is dead, or that have a wrong MASTER_ADDR, so wait for
# up to two and a half times the timeout of init_process_group.
#
# Guessed: TCPStore(..., timeout=2 s) and init_process_group(timeout=2 s) give up after 2 s.
# Seen: gave up after 4.3, 5.1, 3.5, 3.3, 3.1, 3.7 s of a timeout of 2 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import datetime
import os
import socket
import time

import torch.distributed as dist

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "1", "WORLD_SIZE": "2"}
took = []
for _ in range(6):
    began = time.monotonic()
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
    except dist.DistNetworkError:
        took.append(time.monotonic() - began)
print(f"gave up after {', '.join(f'{seconds:.1f}' for seconds in took)} s of a timeout of 2 s")
raise SystemExit(not (len(took) == 6 and max(took) > 3))
PYTHON
