#!/usr/bin/env bash
# torch 2.13.0 (CPU build), which needs g++ for TorchInductor.
#
# Behaviour: a custom operator that writes to an optional tensor argument and returns one tensor runs eagerly, and under
# torch.compile with the backends "eager" and "aot_eager". With "inductor" compilation ends in an InductorError. The same
# operator with an argument that is not optional, or with two results, compiles.
#
# Guess that was wrong: what "aot_eager" compiles, Inductor can lower, and mutates_args may name an optional tensor.
#
# Output seen:
#   optional, one result    aot_eager: runs    inductor: InductorError
#   optional, two results   aot_eager: runs    inductor: runs
#   required, one result    aot_eager: runs    inductor: runs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: torch==2.13.0 numpy==2.4.6
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
from typing import Optional

import torch
from torch import Tensor


@torch.library.custom_op("finding::optional_one", mutates_args=("noted",))
def optional_one(x: Tensor, noted: Optional[Tensor] = None) -> Tensor:
    return x + 1


@torch.library.custom_op("finding::optional_two", mutates_args=("noted",))
def optional_two(x: Tensor, noted: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    return x + 1, x + 2


@torch.library.custom_op("finding::required_one", mutates_args=("noted",))
def required_one(x: Tensor, noted: Tensor) -> Tensor:
    return x + 1


optional_one.register_fake(lambda x, noted=None: torch.empty_like(x))
optional_two.register_fake(lambda x, noted=None: (torch.empty_like(x), torch.empty_like(x)))
required_one.register_fake(lambda x, noted: torch.empty_like(x))


def outcome(operator, arguments, backend: str) -> str:
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: operator(x, *arguments), backend=backend)(torch.ones(4))
        return "runs"
    except Exception as error:
        return type(error).__name__


cases = {
    "optional, one result": (optional_one, ()),
    "optional, two results": (optional_two, ()),
    "required, one result": (required_one, (torch.zeros(4),)),
}
found = []
for name, (operator, arguments) in cases.items():
    found.append([outcome(operator, arguments, backend) for backend in ("aot_eager", "inductor")])
    print(f"{name:23s} aot_eager: {found[-1][0]}    inductor: {found[-1][1]}")
raise SystemExit(found != [["runs", "InductorError"], ["runs", "runs"], ["runs", "runs"]])
PYTHON
