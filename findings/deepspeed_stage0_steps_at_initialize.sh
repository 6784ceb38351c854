#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0 (CPU).
#
# Behaviour: at ZeRO stage 0 in bf16, deepspeed.initialize() takes one step of the client's optimizer, with zero
# gradients, to have its state allocated. AdamW's weight decay acts in that step and its step counter stands at 1: the
# fp32 masters are shrunk by lr x weight_decay before training begins, and the first real update is bias-corrected as
# the second. At stages 1, 2 and 3 nothing of this happens.
#
# Guess that was wrong: building an engine changes no weight and counts no step.
#
# Output seen (lr 0.1, weight_decay 0.5: one decay step leaves 0.95):
#   stage 0: masters / weights = 0.95, steps counted = 1
#   stage 1: masters / weights = 1.00, steps counted = 0
#   stage 2: masters / weights = 1.00, steps counted = 0
#   stage 3: masters / weights = 1.00, steps counted = 0
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

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a helper that would be compiled with g++
stage = int(sys.argv[1])
model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
weights = model.weight.detach().float().clone()
client = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "bf16"},
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
}
_, wrapper, _, _ = deepspeed.initialize(model=model, optimizer=client, config=config)
masters = {0: "fp32_groups", 1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
held = getattr(wrapper, masters.get(stage, "fp32_partitioned_groups_flat"))
while isinstance(held, (list, tuple)):
    held = held[0]
ratio = (held.detach().flatten()[:16] / weights.flatten()).mean().item()
steps = max((int(state["step"]) for state in client.state.values() if "step" in state), default=0)
print(f"stage {stage}: masters / weights = {ratio:.2f}, steps counted = {steps}")
PY

for stage in 0 1 2 3; do
  "$folder/venv/bin/python" "$folder/probe.py" $stage 2>/dev/null | grep '^stage'
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
stage 0: masters / weights = 0.95, steps counted = 1
stage 1: masters / weights = 1.00, steps counted = 0
stage 2: masters / weights = 1.00, steps counted = 0
stage 3: masters / weights = 1.00, steps counted = 0
SEEN
