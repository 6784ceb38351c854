#!/usr/bin/env bash
# torch 2.13.0, its CPU build: the cast to float8_e4m3fn makes infinity, and every number above it, the largest finite
# number, 448; the cast to float8_e5m2 keeps infinity and makes it of numbers above 57344. NaN stays NaN in both. (torch
# 2.11.0 makes NaN of infinity in e4m3fn, on a CPU and on an H200.)
#
# Guessed: a cast that is out of range is not finite in either type, so a check for finite results sees it.
# Seen: e4m3fn 448.0 448.0 -448.0 nan
#       e5m2 inf inf -inf nan
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

x = torch.tensor([float("inf"), 1e9, -float("inf"), float("nan")])
found = {kind: " ".join(map(str, x.to(getattr(torch, f"float8_{kind}")).float().tolist())) for kind in ("e4m3fn", "e5m2")}
for kind, values in found.items():
    print(kind, values)
raise SystemExit(found != {"e4m3fn": "448.0 448.0 -448.0 nan", "e5m2": "inf inf -inf nan"})
PYTHON
