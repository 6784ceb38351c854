"""The guard of the kernels' tests: the last element of a tensor can be read, the one behind it cannot."""

import signal
import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
from tests.kernels.guard_page import guarded
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
copy = guarded(torch.arange(1000.0).untyped_storage())
whole = torch.empty(0).set_(copy, 0, (1000,))
assert whole.sum() == 499500, whole
print("read", flush=True)
import ctypes
ctypes.string_at(copy.data_ptr() + 4000 + int(sys.argv[1]), 1)
"""


def test_what_stands_behind_a_tensor_cannot_be_read():
    codes = {}
    for behind in (-1, 0):
        ended = subprocess.run([sys.executable, "-c", PROGRAM, str(behind)], capture_output=True, text=True)
        assert ended.stdout == "read\n", ended.stderr
        codes[behind] = ended.returncode
    assert codes == {-1: 0, 0: -signal.SIGSEGV}
