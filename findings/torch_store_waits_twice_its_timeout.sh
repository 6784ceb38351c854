#!/usr/bin/env bash
# torch 2.13.0, its CPU build: a client of TCPStore that finds nobody at the address tries a second time, after a random
# delay and with the whole timeout again. Ranks whose rank 0 is dead, or that have a wrong MASTER_ADDR, so wait for up to two
# and a half times the timeout of init_process_group.
#
# Guessed: TCPStore(..., timeout=4 s) and init_process_group(timeout=4 s) give up after 4 s.
# Seen: gave up after 8.7 s of a timeout of 4 s
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
began = time.monotonic()
try:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))
except dist.DistNetworkError:
    took = time.monotonic() - began
    print(f"gave up after {took:.1f} s of a timeout of 4 s")
    raise SystemExit(took < 5)
raise SystemExit(1)
PYTHON
