"""Relations between settings of different groups, in the order of the error report.

model.py has the relations within `model.*`, since models are also built without a run.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Protocol

from megatron_tn.config.bounds import Relations, out_of_bounds
from megatron_tn.config.checkpoint import CheckpointConfig
from megatron_tn.config.cluster import ClusterConfig
from megatron_tn.config.data import DataConfig
from megatron_tn.config.engine import EngineConfig
from megatron_tn.config.evaluation import EvaluationConfig
from megatron_tn.config.model import SOFTMAX_KINDS, ModelConfig
from megatron_tn.config.optim import OF_MUON, OptimConfig
from megatron_tn.config.parallel import ParallelConfig
from megatron_tn.config.schedule import ScheduleConfig


class Settings(Protocol):
    """The settings that relations read; implemented by config.run.TrainConfig."""

    run_dir: str
    distributed_timeout_s: int
    hang_timeout_s: int
    nodes: int
    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    cluster: ClusterConfig
    evaluation: EvaluationConfig


MOST_TOKENS = 2**31  # of a microbatch

RELATIONS = Relations()  # between the settings of a run
WORLD = Relations()  # between settings and the number of processes


def run_problems(config: Settings, world_size: int | None) -> list[str]:
    """One line for each setting out of bounds and for each violated relation; [] if there is none.

    world_size: number of processes; None skips the relations in WORLD.
    """
    out = out_of_bounds(config)
    model = config.model.problems(config.parallel.tp) if "parallel.tp" not in out else []
    found = [*out.values(), *model, *RELATIONS.broken(out, config)]
    if world_size:
        found += WORLD.broken(out, config, world_size)
    return list(dict.fromkeys(found))


@RELATIONS.reads()
def _run_folder_has_a_name(config: Settings) -> Iterator[str]:
    if not config.run_dir.strip():
        yield f"run_dir={config.run_dir!r} must name a folder: the run's files would lie in the current one"


@RELATIONS.reads()
def _matrix_rates_are_rising_pairs(config: Settings) -> Iterator[str]:
    rates = config.cluster.matrix_rates
    pairs = all(len(pair) == 2 and all(0 < value < math.inf for value in pair) for pair in rates)
    if not pairs or any(one[0] >= other[0] for one, other in itertools.pairwise(rates)):
        yield (
            f"cluster.matrix_rates={rates} must be pairs [smallest dimension, TFLOP/s] of numbers above 0, the "
            "dimensions rising"
        )


@RELATIONS.reads("parallel.tp")
def _sequence_parallel_needs_tensor_parallel(config: Settings) -> Iterator[str]:
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        yield (
            "parallel.sequence_parallel=true shares tokens out over tensor-parallel ranks, but parallel.tp=1: raise "
            "parallel.tp"
        )


@RELATIONS.reads("schedule.steps")
def _skipped_batches_are_in_the_schedule(config: Settings) -> Iterator[str]:
    try:
        last = max((last for _, last in config.data.skip_ranges), default=0)
    except ValueError as error:
        yield str(error)
        return
    if last > config.schedule.steps:
        yield f"data.skip_batches: step {last} is above schedule.steps={config.schedule.steps}"


@RELATIONS.reads("hang_timeout_s", "distributed_timeout_s")
def _a_hang_is_seen_before_collectives_give_up(config: Settings) -> Iterator[str]:
    if config.hang_timeout_s >= config.distributed_timeout_s:
        yield (
            f"hang_timeout_s={config.hang_timeout_s} must be below distributed_timeout_s="
            f"{config.distributed_timeout_s}: collectives that give up first would hide the rank they waited for"
        )


@RELATIONS.reads("checkpoint.keep_best", "checkpoint.every", "evaluation.every", "schedule.steps")
def _the_best_checkpoints_have_held_out_losses(config: Settings) -> Iterator[str]:
    keep_best, saved, evaluated = config.checkpoint.keep_best, config.checkpoint.every, config.evaluation.every
    if not keep_best:
        return
    if not (config.evaluation.manifest and evaluated):
        yield (f"checkpoint.keep_best={keep_best} needs held-out losses: set evaluation.manifest and evaluation.every")
    elif saved and math.lcm(saved, evaluated) > config.schedule.steps:
        yield (
            f"checkpoint.keep_best={keep_best} needs checkpoints of evaluated steps, but the first common multiple of "
            f"checkpoint.every={saved} and evaluation.every={evaluated}, {math.lcm(saved, evaluated)}, is above "
            f"schedule.steps={config.schedule.steps}"
        )


@RELATIONS.reads("data.sequence_length", "parallel.cp")
def _every_slice_has_a_token(config: Settings) -> Iterator[str]:
    if config.data.sequence_length < config.parallel.cp:
        yield f"data.sequence_length={config.data.sequence_length} is smaller than parallel.cp={config.parallel.cp}"


@RELATIONS.reads("data.micro_batch", "data.sequence_length")
def _a_microbatch_has_a_size(config: Settings) -> Iterator[str]:
    data = config.data
    if data.micro_batch * data.sequence_length > MOST_TOKENS:
        yield (
            f"data.micro_batch={data.micro_batch} x data.sequence_length={data.sequence_length} must be at most "
            f"{MOST_TOKENS} tokens of a microbatch"
        )


@RELATIONS.reads("parallel.cp", "model.layers")
def _slices_of_a_sequence_pass_a_state(config: Settings) -> Iterator[str]:
    model = config.model
    if config.parallel.cp > 1 and model.attention and set(model.mixers) & set(SOFTMAX_KINDS):
        setting = f"model.architecture={model.architecture}"
        if model.architecture == "transnormer":
            setting = f"model.attention=[{', '.join(model.attention)}]"
        yield (
            f"parallel.cp={config.parallel.cp} does not go with {setting}: context parallelism "
            "passes the state of linear attention from slice to slice, and softmax attention has none"
        )


@RELATIONS.reads("data.sequence_length", "model.max_length")
def _no_sequence_is_longer_than_the_model(config: Settings) -> Iterator[str]:
    if 0 < config.model.max_length < config.data.sequence_length:
        yield (
            f"data.sequence_length={config.data.sequence_length} is longer than model.max_length="
            f"{config.model.max_length}"
        )


@RELATIONS.reads("schedule.warmup_steps", "schedule.steps")
def _warm_up_ends_before_the_run(config: Settings) -> Iterator[str]:
    schedule = config.schedule
    if schedule.warmup_steps >= schedule.steps:
        yield f"schedule.warmup_steps={schedule.warmup_steps} must be below schedule.steps={schedule.steps}"


@RELATIONS.reads("schedule.warmup_steps", "schedule.steps", "schedule.decay_fraction")
def _warm_up_ends_before_the_decay(config: Settings) -> Iterator[str]:
    schedule = config.schedule
    begin = schedule.steps - schedule.decay_steps
    if schedule.name == "wsd" and schedule.steps > schedule.warmup_steps > begin:
        room = (schedule.steps - schedule.warmup_steps) / schedule.steps
        room = math.floor(1000 * room) / 1000 or room  # rounded down
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} overlaps the decay of schedule.name=wsd, which begins "
            f"after step {begin}: schedule.decay_fraction={schedule.decay_fraction} of schedule.steps={schedule.steps} "
            f"is {schedule.decay_steps} steps; set schedule.decay_fraction to at most {room}, or "
            f"schedule.warmup_steps to at most {begin}"
        )


@RELATIONS.reads()
def _apex_keeps_its_own_masters(config: Settings) -> Iterator[str]:
    if config.optim.fused == "apex" and config.engine.name == "deepspeed" and config.engine.zero_stage == 0:
        yield (
            "optim.fused=apex does not go with engine.zero_stage=0, where DeepSpeed flattens apex's masters: set "
            "optim.fused=auto or engine.zero_stage=1"
        )


@RELATIONS.reads()
def _muons_settings_are_read(config: Settings) -> Iterator[str]:
    for field in dataclasses.fields(OptimConfig):
        value = getattr(config.optim, field.name)
        if field.name in OF_MUON and config.optim.name != "muon" and value != field.default:
            yield f"optim.{field.name}={value} is a setting of optim.name=muon, but optim.name={config.optim.name}"


@RELATIONS.reads()
def _a_share_of_steps_decays_in_wsd(config: Settings) -> Iterator[str]:
    schedule = config.schedule
    if schedule.name != "wsd" and schedule.decay_fraction != ScheduleConfig.decay_fraction:
        yield (
            f"schedule.decay_fraction={schedule.decay_fraction} is a setting of schedule.name=wsd, but schedule.name="
            f"{schedule.name}: set schedule=wsd, or leave it out"
        )


@RELATIONS.reads()
def _deepspeed_reads_its_own_settings(config: Settings) -> Iterator[str]:
    if config.engine.deepspeed_config and config.engine.name != "deepspeed":
        yield f"engine.deepspeed_config is set, but engine.name={config.engine.name} is not deepspeed"


@RELATIONS.reads()
def _gradients_are_summed_in_a_type_the_engine_has(config: Settings) -> Iterator[str]:
    engine = config.engine
    if engine.gradient_dtype == "bf16" and (engine.name != "deepspeed" or engine.precision != "bf16"):
        yield (
            "engine.gradient_dtype=bf16 needs engine.name=deepspeed and engine.precision=bf16; here engine.name="
            f"{engine.name}, engine.precision={engine.precision}"
        )


@RELATIONS.reads()
def _fp8_products_are_not_compiled(config: Settings) -> Iterator[str]:
    if config.engine.products == "fp8" and config.engine.compile != "none":
        yield (
            f"engine.products=fp8 does not go with engine.compile={config.engine.compile}: torch.compile sees no fp8 "
            "operands. Set engine.compile=none or engine.products=bf16"
        )


@RELATIONS.reads("parallel.cp")
def _what_a_cuda_graph_can_hold(config: Settings) -> Iterator[str]:
    engine, cp = config.engine, config.parallel.cp
    if not engine.cuda_graph:
        return
    if not engine.sums_own_gradients:
        yield (
            "engine.cuda_graph=true goes with engine=local, or engine=zero1 with engine.precision=bf16 and "
            f"engine.gradient_dtype=fp32; here engine.name={engine.name}, engine.zero_stage={engine.zero_stage}, "
            f"engine.precision={engine.precision}, engine.gradient_dtype={engine.gradient_dtype}"
        )
    if engine.compile != "none":
        yield f"engine.cuda_graph=true captures eager passes, but engine.compile={engine.compile} is not none"
    if cp > 1:
        yield f"engine.cuda_graph=true does not go with parallel.cp={cp}, whose slices' bounds are computed on the host"


@WORLD.reads("parallel.tp", "parallel.cp")
def _the_layout_divides_the_world(config: Settings, world_size: int) -> Iterator[str]:
    tp, cp = config.parallel.tp, config.parallel.cp
    if world_size % (tp * cp):
        how = f"; launch/local.sh -n {tp * cp} starts as many processes" if world_size == 1 else ""
        nodes, node = config.nodes, config.cluster.gpus_per_node
        planned = f" (nodes={nodes} x cluster.gpus_per_node={node})" if nodes * node == world_size else ""
        yield (
            f"world size {world_size}{planned} is not a multiple of parallel.tp={tp} x parallel.cp={cp} = "
            f"{tp * cp}{how}"
        )


@WORLD.reads("parallel.tp", "parallel.cp", "data.global_batch", "data.micro_batch")
def _microbatches_divide_the_batch(config: Settings, world_size: int) -> Iterator[str]:
    data, ranks = config.data, config.parallel.tp * config.parallel.cp
    dp = world_size // ranks
    if world_size % ranks == 0 and data.global_batch % (data.micro_batch * dp):
        yield (
            f"data.global_batch={data.global_batch} is not a multiple of data.micro_batch={data.micro_batch} x "
            f"data-parallel size {dp} = {data.micro_batch * dp}"
        )


@WORLD.reads(
    *("parallel.tp", "parallel.cp", "data.global_batch", "data.micro_batch", "schedule.steps"),
    *("schedule.ramp_from", "schedule.ramp_increment", "schedule.ramp_steps"),
)
def _the_batch_ramp_leads_to_the_batch(config: Settings, world_size: int) -> Iterator[str]:
    schedule, data, ranks = config.schedule, config.data, config.parallel.tp * config.parallel.cp
    first, increment, steps = schedule.ramp_from, schedule.ramp_increment, schedule.ramp_steps
    if first == increment == steps == 0 or world_size % ranks:
        return
    shown = f"schedule.ramp_from={first}, schedule.ramp_increment={increment}"
    if first == 0 or increment == 0:
        yield f"{shown}: a batch-size ramp needs both to be at least 1"
        return
    increments, rest = divmod(data.global_batch - first, increment)
    if increments < 1 or rest:
        yield f"{shown} do not lead to data.global_batch={data.global_batch} in whole increments"
    elif steps < increments:
        yield (
            f"schedule.ramp_steps={steps} is below the {increments} increments from schedule.ramp_from={first} to "
            f"data.global_batch={data.global_batch}"
        )
    if steps >= schedule.steps:
        yield (
            f"schedule.ramp_steps={steps} must be below schedule.steps={schedule.steps}: the batch would never reach "
            f"data.global_batch={data.global_batch}"
        )
    multiple = data.micro_batch * (world_size // ranks)
    if first % multiple or increment % multiple:
        yield f"{shown} must be multiples of data.micro_batch x data-parallel size = {multiple}"


def device_problems(config: Settings, *, cuda: bool) -> list[str]:
    """One line for each setting that needs a missing CUDA device. cuda: whether this process has one."""
    if config.engine.cuda_graph and not cuda:
        return ["engine.cuda_graph=true needs a CUDA device, and this process sees none"]
    return []
