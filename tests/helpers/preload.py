"""What every rank of `run_ranks` needs, imported once in the fork server: a rank then starts in a tenth of a second."""

import gc

import torch._inductor.compile_fx  # noqa: F401 (PyTorch's compiler: four seconds)
from torch._dynamo import trace_rules

import megatron_tn.checkpoint.load
import megatron_tn.checkpoint.save
import megatron_tn.engine.build
import megatron_tn.engine.deepspeed.engine
import megatron_tn.engine.fsdp2
import megatron_tn.train  # noqa: F401
from megatron_tn.cli.overrides import CommandLine
from megatron_tn.config import TrainConfig
from tests.helpers.training import SMALL

# What is read, parsed and looked up once in a process: Hydra's plugins and grammar, the compiler's table of functions.
assert CommandLine.parse(TrainConfig, "config", [*SMALL]).composed.model.layers == 2
trace_rules.lookup(gc.collect)

gc.freeze()  # collections in a rank then need not look at (and copy) what the server imported
