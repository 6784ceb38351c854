"""Memory of the model's state, per rank and per kind, before anything is started."""

from __future__ import annotations

import math

from megatron_tn.config import TrainConfig
from megatron_tn.model.flops import parameter_count

GIB = 2**30


def state_bytes(config: TrainConfig, world_size: int) -> dict[str, int]:
    """Bytes a rank holds of parameters, gradients, fp32 masters and AdamW's two moments, by kind.

    Activations are not counted. Tensor parallel divides everything; data parallel divides moments and masters from
    ZeRO 1 on, gradients from 2 on, parameters at 3 (arXiv 1910.02054, figure 1). In fp32 a parameter is its own master
    where nothing is partitioned.
    """
    engine = config.engine
    data = world_size // config.parallel.tp
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    local = math.ceil(parameter_count(config.model) / config.parallel.tp)
    width = 2 if engine.precision == "bf16" else 4
    gradient_width = 4 if engine.name == "local" or engine.gradient_dtype == "fp32" else width

    def over_data(count: int, from_stage: int) -> int:
        return math.ceil(count / data) if stage >= from_stage else count

    separate_masters = engine.precision == "bf16" or stage in (1, 2)
    return {
        "parameters": over_data(local * width, 3),
        "gradients": over_data(local * gradient_width, 2),
        "masters": over_data(local * 4, 1) if separate_masters else 0,
        "moments": over_data(local * 8, 1),
    }
