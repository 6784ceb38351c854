#!/usr/bin/env bash
# wandb 0.31.0: `wandb sync` of the offline files of one run id, of which an earlier process was killed. The killed one's file
# ends in the middle of a record (wandb writes blocks of 32 KiB); sync uploads what is whole, says that the file ends with an
# incomplete record, and does not come to the later files of that id, with exit code 0. Called again it uploads the rows of the
# first file a second time, behind the others. With the incomplete record cut off it uploads all files, in order.
#
# Guessed: what a killed process has left is uploaded as far as it goes, and the files after it too; again is harmless.
# Seen, for 400 steps of a killed process and steps 401 to 403 of the next one (rows that the server got; K: of the first):
#   once: K rows of the first file, 0 of the second, exit code 0
#   again: 2 K rows of the first file, 0 of the second, exit code 0
#   cut: K rows of the first file, 3 of the second, exit code 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
cd "$folder"
HOME="$folder" WANDB_API_KEY=$(printf 'a%.0s' {1..40}) "$folder/venv/bin/python" - <<'PYTHON'
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOG = """
import os, sys, time, wandb
run = wandb.init(project="p", id="one", mode="offline", resume="allow", settings=wandb.Settings(silent=True, console="off"))
first, last = map(int, sys.argv[1:])
for step in range(first, last + 1):
    run.log({f"value_{n}": step for n in range(20)}, step=step)
if first == 1:
    time.sleep(600)
run.finish()
"""
rows = []


class Server(BaseHTTPRequestHandler):
    """As much of a server as `wandb sync` needs; the rows of each upload are appended."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        found = {}
        if self.path.endswith("/graphql"):
            found = {"data": answer(re.search(r"(?:query|mutation)\s+(\w+)", json.loads(content)["query"])[1])}
        elif self.path.endswith("/file_stream"):
            history = json.loads(content).get("files", {}).get("wandb-history.jsonl", {"content": []})
            rows.extend(json.loads(line)["_step"] for line in history["content"])
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST


def answer(question):
    us = {"id": "e", "name": "us"}
    bucket = {"id": "b", "name": "one", "historyLineCount": len(rows), "logLineCount": 0, "eventsLineCount": 0}
    bucket |= {"summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}', "displayName": "one"}
    bucket |= {"historyTail": json.dumps([json.dumps({"_step": rows[-1]})] if rows else []), "eventsTail": "[]"}
    match question:
        case "Viewer":
            teams = {"edges": [{"node": {"name": "us"}}]}
            return {"viewer": {"id": "u", "entity": "us", "username": "me", "flags": "{}", "teams": teams}}
        case "RunResumeStatus":
            return {"model": {"id": "m", "name": "p", "entity": us, "bucket": bucket if rows else None}}
        case "UpsertBucket":
            project = {"id": "p", "name": "p", "entity": us}
            more = {"description": "", "sweepName": None, "project": project}
            return {"upsertBucket": {"bucket": bucket | more, "inserted": not rows}}
        case "CreateRunFiles":
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {}


def log(first, last):
    return subprocess.Popen([sys.executable, "-c", LOG, str(first), str(last)], start_new_session=True)


def files():
    return sorted(Path("wandb").glob("offline-run-*/*.wandb"))


def whole(content):
    """Where the last whole record of a LevelDB log with a header of 7 bytes ends."""
    at = end = 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += 7 + length
        if at <= len(content) and kind in (1, 4):
            end = at
    return end


def sync():
    command = [str(Path(sys.executable).with_name("wandb")), "sync", *(str(file.parent) for file in files())]
    return subprocess.run(command, capture_output=True, text=True)


def told(name, code):
    print(f"{name}: {sum(s <= 400 for s in rows)} rows of the first file, {sum(s > 400 for s in rows)} of the second, {code}")


killed = log(1, 400)
end = time.monotonic() + 120
while not (files() and files()[0].stat().st_size >= 65536) and time.monotonic() < end:
    time.sleep(0.2)
time.sleep(3)
os.killpg(killed.pid, signal.SIGKILL)
killed.wait()
time.sleep(1.1)  # names of folders have seconds
assert log(401, 403).wait() == 0
assert whole(files()[0].read_bytes()) < files()[0].stat().st_size
server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
seen = []
for name in ("once", "again", "cut"):
    if name == "cut":
        rows.clear()
        os.truncate(files()[0], whole(files()[0].read_bytes()))
    done = sync()
    seen.append((sum(step <= 400 for step in rows), sum(step > 400 for step in rows), done.returncode))
    told(name, f"exit code {done.returncode}")
    if name == "once":
        assert "the file ends with an incomplete record" in done.stderr
count = seen[0][0]
sys.exit(not count or seen != [(count, 0, 0), (2 * count, 0, 0), (count, 3, 0)])
PYTHON
