#!/usr/bin/env bash
# triton 3.7.1's interpreter (TRITON_INTERPRET=1), which runs kernels on a CPU: its cast from fp32 to fp8 drops the carry
# of a rounding into the exponent, so that -31.75 becomes -16, and makes 384 of NaN. A GPU gives -32 and NaN.
#
# Guessed: the interpreter's cast is the GPU's, so a test of a quantising kernel in it compares bit for bit.
# Seen: -31.75 7.9 1.05 nan -> -16.0 4.0 1.0 384.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.4.6 triton==3.7.1
cat > "$folder/cast.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x_pointer, y_pointer):
    place = tl.arange(0, 4)
    x = tl.load(x_pointer + place)
    tl.store(y_pointer + place, x.to(tl.float8e4nv))


x = torch.tensor([-31.75, 7.9, 1.05, float("nan")])
y = torch.zeros(4, dtype=torch.float8_e4m3fn)
cast[(1,)](x, y)
found = " ".join(map(str, y.float().tolist()))
print("-31.75 7.9 1.05 nan ->", found)
raise SystemExit(found != "-16.0 4.0 1.0 384.0")
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"
