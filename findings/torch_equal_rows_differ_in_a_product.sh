#!/usr/bin/env bash
# torch 2.13.0, its CPU build with MKL 2024.2, on an AMD EPYC with AVX-512: with two threads, a linear layer gives different
# results for equal rows of one input of 5 to 7 or 9 to 11 rows, and one row alone gives a third. The rows are shared out
# to the threads in blocks that different kernels multiply.
#
# Guessed: equal rows of one product are equal; so a batch of a fixed number of rows makes a row's result independent of
# its place in the batch and of its company.
# Seen: rows of one product that differ: 5 6 7 9 10 11
#       numbers of rows whose first row is as one row alone: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=2 "$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
torch.set_num_threads(2)
weight, row = torch.randn(1024, 256), torch.randn(1, 256)
alone = torch.nn.functional.linear(row, weight)
differ, as_alone = [], []
for rows in range(1, 17):
    y = torch.nn.functional.linear(row.repeat(rows, 1), weight)
    assert torch.allclose(y, alone.expand_as(y), atol=1e-3)
    differ += [rows] * (not torch.equal(y, y[:1].expand_as(y)))
    as_alone += [rows] * torch.equal(y[:1], alone)
print("rows of one product that differ:", *differ, "\nnumbers of rows whose first row is as one row alone:", *as_alone)
raise SystemExit((differ, as_alone) != ([5, 6, 7, 9, 10, 11], [1]))
PYTHON
