#!/usr/bin/env bash
# torch 2.13.0 (CPU).
#
# Behaviour: torch.utils.flop_counter.FlopCounterMode counts no operations of scaled_dot_product_attention on a CPU, whose
# fused operator, the default there, has no formula, and says nothing of it; its backward pass counts none either. A
# GPU's fused operators have formulas, and so has the CPU's unfused form, which a caller has to ask for.
#
# Guess that was wrong: the count of a model does not depend on the device, or an operator without a formula is reported.
#
# Output seen (forward; forward + backward; 4 heads, 64 queries and keys of width 32):
#   as called: 0; 0
#   SDPBackend.MATH: 2097152; 6291456
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(kernel):
    q, k, v = (torch.randn(1, 4, 64, 32, requires_grad=True) for _ in range(3))
    with kernel, FlopCounterMode(display=False) as counter:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


default, plain = counted(contextlib.nullcontext()), counted(sdpa_kernel(SDPBackend.MATH))
product = 2 * 4 * 64 * 64 * 32
print(f"as called: {default[0]}; {default[1]}\nSDPBackend.MATH: {plain[0]}; {plain[1]}")
raise SystemExit((default, plain) != ((0, 0), (2 * product, 6 * product)))
PYTHON
