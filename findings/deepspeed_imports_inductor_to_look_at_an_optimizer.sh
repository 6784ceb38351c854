#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0 (CPU), Linux.
#
# Behaviour: deepspeed.initialize with an optimizer of torch imports TorchInductor, though nothing is compiled: to ask
# whether the optimizer is its own Muon, DeepSpeed imports that module, whose functions carry a decorator that is
# torch.compile. On two cores this takes about a second of every process's start.
#
# Guess that was wrong: a training script that never compiles anything does not import the compiler.
#
# Output seen (modules of torch._inductor):
#   as it is: 16 before initialize, 180 after
#   with a decorator that does nothing: 16 before initialize, 16 after
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.6 setuptools wheel
DS_BUILD_OPS=0 $pip --no-build-isolation deepspeed==0.19.8

cat >"$folder/probe.py" <<'PY'
import os
import sys

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from deepspeed.runtime import compiler

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a helper that would be compiled with g++


def count() -> int:
    return sum(name.startswith("torch._inductor.") for name in sys.modules)


if sys.argv[1] == "without":
    compiler.compile = lambda: compiler.dummy_decorator
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.AdamW(model.parameters())
config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True}
before = count()
deepspeed.initialize(model=model, optimizer=optimizer, config=config | {"zero_optimization": {"stage": 1}})
print(f"modules: {before} {count()}")
PY

run() { "$folder/venv/bin/python" "$folder/probe.py" "$@" 2>/dev/null | sed -n 's/^modules: //p'; }
read -r before after <<<"$(run plain)"
echo "as it is: $before before initialize, $after after"
read -r before_without after_without <<<"$(run without)"
echo "with a decorator that does nothing: $before_without before initialize, $after_without after"
[ "$after" -gt $((before + 50)) ] && [ "$after_without" -lt $((before_without + 10)) ]
