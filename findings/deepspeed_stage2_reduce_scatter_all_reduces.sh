#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0 (CPU).
#
# Behaviour: ZeRO stage 2 with its default "reduce_scatter": true sends no reduce-scatter. Each bucket of gradients is
# all-reduced, each rank keeps its part, and the rest was sent for nothing: twice the bytes. Only with
# "use_multi_rank_bucket_allreduce": false (its default is true) is each part reduced to the rank that keeps it.
#
# Guess that was wrong: stage 2 with "reduce_scatter": true sends each gradient to the rank that keeps it, half an
# all-reduce.
#
# Output seen (4096 parameters, fp32 gradients, two processes; elements of each collective in a backward pass):
#   default: {'allreduce_': 4096}
#   use_multi_rank_bucket_allreduce=false: {'reduce_': 4096}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 numpy==2.4.6 setuptools wheel
DS_BUILD_OPS=0 $pip --no-build-isolation deepspeed==0.19.8

cat >"$folder/probe.py" <<'PY'
import collections
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a helper that would be compiled with g++


class Sent(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        if name.startswith("c10d."):
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, torch.Tensor)]
            self.elements[name.split(".")[1]] += sum(map(torch.numel, tensors))
        return operator(*args, **(kwargs or {}))


torch.distributed.init_process_group("gloo")
model = torch.nn.Linear(64, 64, bias=False)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2, "reduce_scatter": True},
    "zero_allow_untested_optimizer": True,
}
if sys.argv[1] != "default":
    config["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
loss = engine(torch.ones(1, 64)).sum()
with Sent() as sent:
    engine.backward(loss)
if torch.distributed.get_rank() == 0:
    print(f"{sys.argv[1]}: {dict(sent.elements)}")
PY

for choice in default use_multi_rank_bucket_allreduce=false; do
  "$folder/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 --master-port 29512 "$folder/probe.py" $choice \
    2>/dev/null | grep "^$choice: "
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
default: {'allreduce_': 4096}
use_multi_rank_bucket_allreduce=false: {'reduce_': 4096}
SEEN
