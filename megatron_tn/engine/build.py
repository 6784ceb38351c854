"""From a config and a layout to an engine that is ready to train. The order of wrapping is here, and nowhere else."""

from __future__ import annotations

import torch

from megatron_tn.config import TrainConfig
from megatron_tn.device.allocator import return_cached_segments
from megatron_tn.engine.base import DTYPES, Engine
from megatron_tn.engine.fsdp2 import FSDP2Engine
from megatron_tn.engine.replicated import ReplicatedEngine
from megatron_tn.model.init import fill_initial
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.recompute import recompute_blocks

COMPILE_MODES = {"blocks": None, "cuda_graphs": "reduce-overhead"}


def build_engine(config: TrainConfig, context: ParallelContext, device: torch.device) -> Engine:
    """Model -> placement and type -> recomputation -> compilation -> engine. Parameters are not initialised yet."""
    settings = config.engine
    # 1. The layers hold this rank's tensor-parallel part from the start: nothing whole is ever made. Parameters live in
    #    the computing type and the engine keeps fp32 masters; FSDP2's are the masters, and get storage once sharded.
    zero3 = settings.name == "deepspeed" and settings.zero_stage == 3
    if settings.name == "fsdp2":
        model = build_model(config.model, context, "meta", torch.float32)
    elif zero3:
        from megatron_tn.engine.deepspeed.engine import partitioned_model

        model = partitioned_model(config, context, device)  # each parameter is partitioned as soon as it is made
    else:
        model = build_model(config.model, context, device, DTYPES[settings.precision])
    # 2. Recomputation changes what a block's forward keeps, so compilers and engines must see it.
    recompute_blocks(model.blocks, settings.recompute, settings.recompute_every)
    # 3. One compiled graph serves all blocks of a kind: compile time does not grow with depth.
    if settings.compile != "none":
        for block in model.blocks:
            block.compile(mode=COMPILE_MODES[settings.compile])
    # 4. The engine shards parameters, gradients, masters and moments over data parallelism.
    if settings.name == "local":
        engine = ReplicatedEngine(model, config)
    elif settings.name == "fsdp2":
        engine = FSDP2Engine(model, config, device)
    else:
        from megatron_tn.engine.deepspeed.engine import DeepSpeedEngine  # importing it takes a second

        engine = DeepSpeedEngine(model, config)
    # 5. DeepSpeed copies the parameters twice into new layouts. The allocator would keep the first layouts' segments,
    #    each of a weight's size, which few activations fit.
    return_cached_segments(device)
    return engine


@torch.no_grad()
def initialize_engine(engine: Engine, seed: int) -> None:
    """Give the fp32 masters their initial values, the same for every engine and layout, and zero the optimizer's
    state."""
    axis = engine.context.tp
    specs = engine.model.shard_specs()
    for owned in engine.owned_ranges():
        spec, config = specs[owned.name], engine.model.config
        fill_initial(owned.values["param"], owned.name, spec, axis.rank, axis.size, owned.start, config, seed)
        for kind in engine.state_kinds:
            owned.values[kind].zero_()
    engine.refresh(optimizer_step=0)
