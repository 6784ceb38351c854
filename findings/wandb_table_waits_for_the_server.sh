#!/usr/bin/env bash
# wandb 0.31.0, online: run.log of a number or of wandb.Html returns at once, and a process of wandb's own uploads it.
# run.log of a wandb.Table asks the server first, whether the table's artifact exists, and waits for the answer: a
# training loop that logs generated texts as a table stands still as long as a slow server takes.
#
# Guessed: run.log never waits for the network.
# Seen, with a server on this machine that takes 3 s for that question alone:
#   number: under 1.5 s; html: under 1.5 s; table: 3 s or more
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check wandb==0.31.0
HOME="$folder" "$folder/venv/bin/python" - "$folder" 2>/dev/null <<'PYTHON'
import gzip
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_S = 3.0
PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "us"}}
BUCKET = {"id": "b", "name": "r", "displayName": "r", "description": "", "sweepName": None, "project": PROJECT}


class Server(BaseHTTPRequestHandler):
    """As much of a wandb server as a run of numbers needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_): ...

    def answer(self, found):
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        if not self.path.endswith("/graphql"):
            return self.answer({})
        asked = json.loads(content)
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
        if name == "ArtifactType":
            time.sleep(SLOW_S)
        teams = {"edges": [{"node": {"name": "us"}}]}
        self.answer({"data": {
            "Viewer": {"viewer": {"id": "u", "entity": "us", "username": "me", "flags": "{}", "teams": teams}},
            "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
            "ArtifactType": {"project": None},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
        }.get(name, {})})

    do_PUT = do_POST


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40}

import wandb

run = wandb.init(project="p", id="r", dir=sys.argv[1], settings=wandb.Settings(silent=True, console="off"))
run.log({"number": 0.0})  # the first call starts threads
seconds = {}
for name, value in (
    ("number", 1.0),
    ("html", wandb.Html("<b>text</b>", inject=False)),
    ("table", wandb.Table(columns=["text"], data=[["text"]])),
):
    began = time.monotonic()
    run.log({name: value})
    seconds[name] = time.monotonic() - began
waits = {name: found >= SLOW_S for name, found in seconds.items()}
short = {name: found < SLOW_S / 2 for name, found in seconds.items()}
print("; ".join(f"{name}: {'3 s or more' if waits[name] else 'under 1.5 s'}" for name in seconds), flush=True)
os._exit(not (waits["table"] and short["number"] and short["html"]))
PYTHON
