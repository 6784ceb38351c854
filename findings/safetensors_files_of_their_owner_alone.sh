#!/usr/bin/env bash
# safetensors 0.8.0: save_file makes a file that its owner alone can read (mode 0600), whatever the umask, and makes one
# that others could read unreadable for them when it is written again. save() and a write of one's own follow the umask.
#
# Guessed: a new file gets 0666 less the umask, and an existing file keeps its mode, as with open(path, "wb").
# Seen (umask 022): save_file: 0600; over a file of mode 0644: 0600; open and write: 0644
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save, save_file

os.umask(0o022)
folder = Path(sys.argv[1])
new, old, written = folder / "new", folder / "old", folder / "written"
values = {"a": numpy.zeros(3, dtype=numpy.float32)}
old.write_bytes(b"")
save_file(values, new)
save_file(values, old)
written.write_bytes(save(values))
modes = [path.stat().st_mode & 0o777 for path in (new, old, written)]
print("save_file: {:04o}; over a file of mode 0644: {:04o}; open and write: {:04o}".format(*modes))
raise SystemExit(modes != [0o600, 0o600, 0o644])
PYTHON
