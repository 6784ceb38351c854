#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0 (CPU).
#
# Behaviour: with "optimizer": {"type": "Muon"} DeepSpeed orthogonalises before it takes the gradient norm, so
# "gradient_clipping" clips the orthogonalised update and get_global_grad_norm() reports the update's norm. That norm is
# about sqrt(rank) of each matrix, whatever the gradients are. Clipping at 1, which never acts on the gradients below,
# makes every update sqrt(rank) times smaller, and all of a model's matrices together move by lr x 1 in a step; at 0.1 by
# a tenth of that. At stages 1 and 2 safe_get_full_grad(), called after the backward pass, returns the update, too; at
# stage 3 it returns the gradient.
#
# Guess that was wrong: clipping limits the norm of the gradients, and leaves gradients of norm 0.0002 alone.
#
# Output seen (a matrix of 64 x 64; change of the weights / lr, in norm):
#   stage 1: clipping 0: change 7.00, grad norm 7.00; clipping 1: change 1.00, grad norm 7.00
#   stage 2: clipping 0: change 7.00, grad norm 7.00; clipping 1: change 1.00, grad norm 7.00
#   stage 3: clipping 0: change 7.00, grad norm 7.00; clipping 1: change 1.00, grad norm 7.00
#   norm of the gradient, by autograd alone: 0.0002
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
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # DeepSpeed compiles the iteration, which needs g++
import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a helper that would be compiled with g++
stage = int(sys.argv[1])


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    return model(x).float().square().mean() * 1e-3


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64, bias=False).bfloat16()


if stage == 0:
    model = linear()
    loss_of(model).backward()
    print(f"norm of the gradient, by autograd alone: {model.weight.grad.float().norm():.4f}")
    sys.exit()
model, clipping = linear(), float(sys.argv[2])
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": clipping,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": stage, "reduce_scatter": False},
    "optimizer": {"type": "Muon", "params": {"lr": 0.1, "weight_decay": 0.0}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
before = safe_get_full_fp32_param(model.weight).clone()
engine.backward(loss_of(engine))
engine.step()
change = (safe_get_full_fp32_param(model.weight) - before).norm().item() / 0.1
print(f"clipping {clipping:.0f}: change {change:.2f}, grad norm {float(engine.get_global_grad_norm()):.2f}")
PY

run() { "$folder/venv/bin/python" "$folder/probe.py" "$@" 2>/dev/null | grep -E '^(clipping|norm)'; }
{
  for stage in 1 2 3; do
    echo "stage $stage: $(run $stage 0); $(run $stage 1)"
  done
  run 0
} | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
stage 1: clipping 0: change 7.00, grad norm 7.00; clipping 1: change 1.00, grad norm 7.00
stage 2: clipping 0: change 7.00, grad norm 7.00; clipping 1: change 1.00, grad norm 7.00
stage 3: clipping 0: change 7.00, grad norm 7.00; clipping 1: change 1.00, grad norm 7.00
norm of the gradient, by autograd alone: 0.0002
SEEN
