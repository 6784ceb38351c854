#!/usr/bin/env bash
# torch 2.13.0 (CPU), Linux.
#
# Behaviour: the first call of an operator of torch.library.custom_op that has an autograd rule imports TorchDynamo, and
# with it sympy and parts of TorchInductor: 800 modules, 1.7 s of a start, though nothing is compiled. The first
# torch.optim.Optimizer that is constructed does the same.
#
# Guess that was wrong: a program that never calls torch.compile does not import its machinery.
#
# Output seen (modules of torch._dynamo, of all):
#   import torch: 0 of 1114; after an operator's first call: 93 of 1937
#   import torch: 0 of 1114; after an optimizer's constructor: 93 of 1937
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat >"$folder/probe.py" <<'PY'
import sys

import torch


def count() -> int:
    return sum(name.startswith("torch._dynamo") for name in sys.modules)


def call_an_operator() -> None:
    @torch.library.custom_op("probe::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_autograd(lambda ctx, gradient: 2 * gradient)
    twice(torch.ones(2, requires_grad=True))


def construct_an_optimizer() -> None:
    torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


before, modules = count(), len(sys.modules)
{"an operator's first call": call_an_operator, "an optimizer's constructor": construct_an_optimizer}[sys.argv[1]]()
print(f"import torch: {before} of {modules}; after {sys.argv[1]}: {count()} of {len(sys.modules)}")
sys.exit(not before == 0 < 50 < count())
PY
"$folder/venv/bin/python" "$folder/probe.py" "an operator's first call"
"$folder/venv/bin/python" "$folder/probe.py" "an optimizer's constructor"
