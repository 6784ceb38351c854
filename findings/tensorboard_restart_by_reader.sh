#!/usr/bin/env bash
# tensorboard 2.21.0: a run that starts again at an earlier step writes a new event file whose first events are a file
# version and SessionLog.START at that step, as torch.utils.tensorboard's SummaryWriter(purge_step=4) does. What that takes
# back depends on the reader. EventAccumulator drops every value from the step on. The server's default loader (the
# package tensorboard-data-server) drops a tag's values only when new ones of this tag come, so a tag that is not written
# again keeps what was taken back. The server with --load_fast=false keeps both curves.
#
# Guessed: values from purge_step on are gone, in every reader.
# Seen, for loss at steps 1 to 6 and heldout at 6, then a start at 4 with loss at 4 and 5 (steps that each reader shows):
#   EventAccumulator loss [1, 2, 3, 4, 5] heldout []
#   --load_fast=true loss [1, 2, 3, 4, 5] heldout [6]
#   --load_fast=false loss [1, 2, 3, 4, 5, 6, 4, 5] heldout [6]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorboard==2.21.0 tensorboard-data-server==0.7.2
"$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import json
import socket
import subprocess
import sys
import time
import urllib.request

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

run = f"{sys.argv[1]}/log/run"


def write(values, start=None):
    writer = EventFileWriter(run, filename_suffix=f".{start or 0}")
    if start is not None:
        writer.add_event(Event(wall_time=time.time(), step=start, file_version="brain.Event:2"))
        status = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=start, session_log=status))
    for tag, step, value in values:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()


def served(fast):
    """tag -> steps that the server shows."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", f"{sys.argv[1]}/log", "--port", str(port)]
    server = subprocess.Popen([*command, f"--load_fast={fast}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, found = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=run&tag=", {}
    try:
        for tag in ("loss", "heldout"):
            end = time.monotonic() + 60
            while tag not in found and time.monotonic() < end:
                time.sleep(3)  # both files are read by then
                try:
                    with urllib.request.urlopen(address + tag, timeout=5) as answer:
                        found[tag] = [step for _, step, _ in json.load(answer)]
                except OSError:
                    pass
    finally:
        server.terminate()
        server.wait()
    return found


write([*(("loss", step, 10.0 - step) for step in range(1, 7)), ("heldout", 6, 8.0)])
time.sleep(1.1)  # names of event files have seconds
write([("loss", 4, 0.5), ("loss", 5, 0.5)], start=4)
read = EventAccumulator(run)
read.Reload()
seen = {"EventAccumulator": {tag: [event.step for event in read.Scalars(tag)] for tag in ("loss", "heldout")}}
seen |= {f"--load_fast={fast}": served(fast) for fast in ("true", "false")}
for reader, tags in seen.items():
    print(reader, *(f"{tag} {steps}" for tag, steps in tags.items()))
raise SystemExit(
    seen
    != {
        "EventAccumulator": {"loss": [1, 2, 3, 4, 5], "heldout": []},
        "--load_fast=true": {"loss": [1, 2, 3, 4, 5], "heldout": [6]},
        "--load_fast=false": {"loss": [1, 2, 3, 4, 5, 6, 4, 5], "heldout": [6]},
    }
)
PYTHON
