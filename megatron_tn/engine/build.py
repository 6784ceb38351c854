"""Builds the engine from the config: the order of sharding, recomputation, compilation and engine is fixed here."""

import torch

from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.device.allocator import return_cached_segments
from megatron_tn.engine.base import DTYPES, Engine
from megatron_tn.engine.replicated import ReplicatedEngine
from megatron_tn.model.init import fill_initial
from megatron_tn.model.registry import build_model, norm_bound
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.float8_layers import float8_layers, products_problems
from megatron_tn.parallel.recompute import recompute_blocks

COMPILE_MODES = {"blocks": None, "cuda_graphs": "reduce-overhead"}


def build_engine(config: TrainConfig, context: ParallelContext, device: torch.device) -> Engine:
    """Model on its device -> recomputation -> compilation -> engine. Parameters have no values: `initialize_engine`.

    Raises:
        ConfigError: engine.products=fp8 on a GPU without fp8 products.
    """
    settings = config.engine
    if problems := products_problems(settings.products, device):
        raise ConfigError(problems)
    # 1. Layers allocate this rank's tensor-parallel part only, never the whole weight. Parameters are in the computing
    #    type and the engine keeps fp32 masters. FSDP2's fp32 parameters are the masters, allocated after sharding.
    zero3 = settings.name == "deepspeed" and settings.zero_stage == 3
    if settings.name == "fsdp2":
        model = build_model(config.model, context, "meta", torch.float32)
    elif zero3:
        from megatron_tn.engine.deepspeed.engine import partitioned_model

        model = partitioned_model(config, context, device)  # each parameter is partitioned once allocated
    else:
        model = build_model(config.model, context, device, DTYPES[settings.precision])
    layers = []
    if settings.products == "fp8":
        layers = float8_layers(model.blocks, norm_bound(config.model))
    # 2. Recomputation replaces a block's forward, so it comes before compilers and engines wrap the block.
    recompute_blocks(model.blocks, settings.recompute, settings.recompute_every)
    # 3. Blocks of one class share one compiled graph: compile time does not grow with the number of layers.
    if settings.compile != "none":
        for block in model.blocks:
            block.compile(mode=COMPILE_MODES[settings.compile])
    # 4. The engine shards parameters, gradients, masters and moments over data parallelism.
    if settings.name == "local":
        engine = ReplicatedEngine(model, config)
    elif settings.name == "fsdp2":
        from megatron_tn.engine.fsdp2 import FSDP2Engine  # it imports DTensor and sympy, 0.6 s

        engine = FSDP2Engine(model, config, device)
    else:
        from megatron_tn.engine.deepspeed.engine import DeepSpeedEngine

        engine = DeepSpeedEngine(model, config)
    if layers and settings.keeps_weights:
        engine.update.keep_in_float8(layers, transposed=settings.keeps_fp8_transposes)
    # 5. DeepSpeed copies the parameters twice into new layouts. The allocator would keep the freed layouts' segments,
    #    each the size of one weight, which few later allocations fit.
    return_cached_segments(device)
    return engine


@torch.no_grad()
def initialize_engine(engine: Engine, seed: int) -> None:
    """Write the initial values into the fp32 masters (identical for every engine and parallel layout) and zero the
    optimizer state."""
    axis = engine.context.tp
    specs = engine.model.shard_specs()
    for owned in engine.owned_ranges():
        spec, config = specs[owned.name], engine.model.config
        fill_initial(owned.values["param"], owned.name, spec, axis.rank, axis.size, owned.start, config, seed)
        for state in owned.values.keys() - {"param"}:
            owned.values[state].zero_()
    engine.refresh(optimizer_step=0)
