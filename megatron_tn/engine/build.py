"""From a config and a layout to an engine that is ready to train. The order of wrapping is here, and nowhere else."""

from __future__ import annotations

import torch

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import Engine
from megatron_tn.engine.local import LocalEngine
from megatron_tn.model.init import initial_value
from megatron_tn.model.transnormer import empty_model
from megatron_tn.parallel.context import ParallelContext

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_engine(config: TrainConfig, context: ParallelContext, device: torch.device) -> Engine:
    """Model -> placement and type -> compilation of each block -> engine. Parameters are not initialised yet."""
    # 1. The layers hold this rank's tensor-parallel part from the start: nothing whole is ever made.
    # 2. Parameters live in the computing type; the engine keeps fp32 masters.
    model = empty_model(config.model, context, device, DTYPES[config.engine.precision])
    # 3. One compiled graph a block: compile time does not grow with depth.
    if config.engine.compile:
        for block in model.model.layers:
            block.compile()
    # 4. The engine shards gradients, masters and moments over data parallelism.
    if config.engine.name == "local":
        return LocalEngine(model, config)
    from megatron_tn.engine.deepspeed import DeepSpeedEngine  # importing it takes a second

    return DeepSpeedEngine(model, config)


@torch.no_grad()
def initialize_engine(engine: Engine, seed: int) -> None:
    """Give the fp32 masters their initial values, the same for every engine and layout, and reset the moments."""
    axis = engine.context.tp
    specs = engine.model.shard_specs()
    name, local = None, None
    for owned in engine.owned_ranges():
        if owned.name != name:
            name, spec = owned.name, specs[owned.name]
            whole = initial_value(name, spec.shape, engine.model.config, seed)
            local = spec.take(whole, axis.rank, axis.size).view(-1)
        owned.values["param"].copy_(local[owned.start : owned.stop])
        owned.values["exp_avg"].zero_()
        owned.values["exp_avg_sq"].zero_()
    engine.refresh(optimizer_step=0)
