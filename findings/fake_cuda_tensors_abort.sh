#!/usr/bin/env bash
# torch 2.13.0 (CPU build): the first differentiable operator on a FakeTensor of device "cuda" ends the process with
# SIGABRT. The operators themselves answer, is_cuda is True, and Python cannot catch what follows.
#
# Guessed: an exception, or a backward pass on fake tensors of any device, which hold no storage.
# Seen: True, then exit code -6 and "PyTorch is not linked with support for cuda devices".
# Run with a Python that has torch: PYTHON=.venv/bin/python findings/fake_cuda_tensors_abort.sh
set -euo pipefail
"${PYTHON:-python3}" - <<'PYTHON'
import subprocess
import sys

program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    x = torch.empty(4, 4, device="cuda", requires_grad=True)
    print(x.is_cuda, flush=True)
    try:
        (x @ x).sum().backward()
    except BaseException as error:
        print("caught", type(error).__name__)
"""
done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
said = "not linked with support for cuda devices" in done.stderr
print(done.stdout.strip(), done.returncode, said)
raise SystemExit((done.stdout.strip(), done.returncode, said) != ("True", -6, True))
PYTHON
