#!/usr/bin/env bash
# fsspec 2026.9.0: get_file of the local file system takes a callback and never calls it. Whoever bounds or shows a
# download by the callback, as it works for http and memory, has no bound for file:// URLs, such as network mounts.
#
# Guessed: relative_update is called with the bytes of each piece, on every file system.
# Seen, for a file of 1000 bytes:
#   memory: 1000 bytes told
#   file: 0 bytes told
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import fsspec
from fsspec.callbacks import Callback


class Count(Callback):
    told = 0

    def relative_update(self, inc=1):
        self.told += inc


told = {}
for name, path in (("memory", "/a"), ("file", f"{sys.argv[1]}/a")):
    system, count = fsspec.filesystem(name), Count()
    system.pipe_file(path, bytes(1000))
    system.get_file(path, f"{sys.argv[1]}/copy", callback=count)
    told[name] = count.told
    print(f"{name}: {count.told} bytes told")
raise SystemExit(told != {"memory": 1000, "file": 0})
PYTHON
