"""The configuration passed to DeepSpeed: keys derived from the run's settings, merged with engine.deepspeed_config."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.model.registry import parameter_count

# DeepSpeed key that the user may only switch off -> its replacement in this project.
REFUSED = {
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "engine.precision (bf16 or fp32)",
    "bfloat16": "engine.precision (bf16 or fp32)",  # old name of bf16; DeepSpeed ignores it when bf16 is set
    "amp": "engine.precision (bf16 or fp32)",
    "torch_autocast": "engine.precision (bf16 or fp32)",
    "activation_checkpointing": "engine.recompute",
    "pipeline": "parallel",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "zero_optimization.offload_optimizer": "nothing yet: checkpoints here read masters and moments on the device",
    "zero_optimization.offload_param": "nothing yet: checkpoints here read parameters on the device",
    "zero_optimization.cpu_offload": "nothing yet: checkpoints here read masters and moments on the device",
    "zero_optimization.cpu_offload_param": "nothing yet: checkpoints here read parameters on the device",
    "zero_optimization.zero_quantized_gradients": "engine.gradient_dtype (fp32 or bf16)",
}

# DeepSpeed key -> (the assumption of this engine that fixes it, the required value).
RELIED_ON = {
    "gradient_allreduce_op": ("the mean over ranks, which this engine cancels", "mean"),
    "managed_gradient_accumulation": ("this engine, which says which microbatch is a step's last", True),
    "bf16.bf16_master_weights_and_grads": ("the masters, which are fp32", False),
    "bf16.bf16_optimizer_states": ("the moments, which are fp32", False),
}


def deepspeed_settings(config: TrainConfig, dp: int) -> dict:
    """The DeepSpeed configuration derived from a run's settings, merged with the user's engine.deepspeed_config.

    dp: number of ranks that see different samples.

    Raises:
        ConfigError: a key of engine.deepspeed_config contradicts a setting, is in REFUSED, or is rejected by DeepSpeed.
    """
    engine = config.engine
    low_precision = engine.precision == "bf16"
    # Without ZeRO, DeepSpeed accumulates in the parameters' type; it has no fp32 accumulation there.
    gradient_dtype = engine.gradient_dtype if engine.zero_stage > 0 and low_precision else engine.precision
    accumulation = config.data.global_batch // (config.data.micro_batch * dp)
    ours = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": low_precision, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": gradient_dtype},
        "communication_data_type": gradient_dtype,  # else DeepSpeed casts fp32 sums to bf16 for the reduction
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": engine.reduce_bucket_elements,
            # DeepSpeed's ZeRO 1 and 2 assert that it is even.
            "allgather_bucket_size": engine.reduce_bucket_elements + engine.reduce_bucket_elements % 2,
            # Prefetch: all weights of block l + 1 are gathered while block l computes.
            "stage3_prefetch_bucket_size": max(block_parameters(config), engine.reduce_bucket_elements),
            "stage3_max_live_parameters": zero3_live_parameters(config),
            "overlap_comm": torch.cuda.is_available() and engine.zero_stage >= 2,
            "contiguous_gradients": engine.zero_stage < 3,  # ZeRO 3 has no buckets here (stage3.py)
        },
    }
    problems: list[str] = []
    settings = _merged(ours, engine.deepspeed_config, _decided(config, ours), problems)
    if engine.deepspeed_config and not problems:
        problems += _refused_by_deepspeed(settings)
        gathered = settings["zero_optimization"]["allgather_bucket_size"]
        if engine.zero_stage in (1, 2) and isinstance(gathered, int) and gathered % 2:
            problems.append(
                f"engine.deepspeed_config: zero_optimization.allgather_bucket_size={gathered} must be even with "
                f"engine.zero_stage={engine.zero_stage}"
            )
    if problems:
        raise ConfigError(problems)
    return settings


def block_parameters(config: TrainConfig) -> int:
    """Number of parameters of one block on one tensor-parallel rank."""
    model = config.model
    blocks = parameter_count(model) - model.vocab_size * model.embed_dim
    return math.ceil(blocks / model.layers / config.parallel.tp)


def zero3_live_parameters(config: TrainConfig) -> int:
    """DeepSpeed's limit on gathered parameters per rank: three blocks (one computing, the next being gathered, the
    previous being freed), and at least DeepSpeed's default of 10^9."""
    return max(3 * block_parameters(config), 10**9)


def _refused_by_deepspeed(settings: dict) -> list[str]:
    """DeepSpeed's own error for `settings` (a removed or unknown key), as a list of 0 or 1 problems."""
    from megatron_tn.engine.deepspeed.adapter import refusal  # importing deepspeed takes a second

    said = refusal(settings)
    return [f"engine.deepspeed_config: DeepSpeed does not take it: {said}"] if said else []


def _decided(config: TrainConfig, ours: dict) -> dict[str, tuple[str, Any]]:
    """Dotted DeepSpeed key -> (the setting of the run that fixes it, the required value)."""
    found = RELIED_ON | {
        "train_batch_size": ("data.global_batch", config.data.global_batch),
        "train_micro_batch_size_per_gpu": ("data.micro_batch", config.data.micro_batch),
        "gradient_accumulation_steps": (
            "data.global_batch / (data.micro_batch x data-parallel size)",
            ours["gradient_accumulation_steps"],
        ),
        "gradient_clipping": ("optim.clip_norm", config.optim.clip_norm),
        "data_types.grad_accum_dtype": ("engine.gradient_dtype", ours["data_types"]["grad_accum_dtype"]),
        "communication_data_type": ("engine.gradient_dtype", ours["communication_data_type"]),
        "zero_optimization.stage": ("engine.zero_stage", config.engine.zero_stage),
    }
    return found | {f"bf16.{key}": ("engine.precision", value) for key, value in ours["bf16"].items()}


def _merged(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    decided: Mapping[str, tuple[str, Any]],
    problems: list[str],
    prefix: str = "",
) -> dict[str, Any]:
    """`ours` updated with `theirs`, recursively; appends to `problems`. A value "auto" in `theirs` keeps ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        name = prefix + key
        if name in REFUSED and not _switched_off(value):
            problems.append(f"engine.deepspeed_config: {name}={value!r} is not taken; its place is {REFUSED[name]}")
        elif name in REFUSED or value == "auto":
            continue
        elif name in decided:
            setting, wanted = decided[name]
            if value != wanted:
                problems.append(
                    f"engine.deepspeed_config: {name}={value!r} contradicts {setting}, by which it is {wanted!r}"
                )
        elif isinstance(value, Mapping):
            merged[key] = _merged(ours.get(key, {}), value, decided, problems, f"{name}.")
        elif isinstance(ours.get(key), Mapping):
            problems.append(f"engine.deepspeed_config: {name}={value!r} must be a mapping")
        else:
            merged[key] = value
    return merged


def _switched_off(value: Any) -> bool:
    """Whether `value` disables a feature: null, false, {"enabled": false}, or for offloading {"device": "none"}."""
    if isinstance(value, Mapping):
        return value.get("enabled") is False or value.get("device") == "none"
    return value is None or value is False
