"""What a run needs of a machine without a GPU: memory before it starts, and hours."""

import logging
import time

import torch

from megatron_tn.config import ModelConfig, TrainConfig
from megatron_tn.device.free_memory import free_bytes
from megatron_tn.engine.base import DTYPES
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model, training_flops_per_token
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.planning.estimate import GIB, buffer_bytes, state_bytes, update_bytes
from megatron_tn.planning.microbatch import microbatch

PYTHON = 0.5 * GIB  # resident bytes of a process that has imported PyTorch and DeepSpeed
CORE_FLOPS = 2e10  # operations a second of one core, to guess by before anything is timed
WORTH_TIMING_S = 60  # a run that is guessed to be shorter is not timed
WORTH_SAYING_S = 5  # a microbatch that is guessed to take longer is announced before it is timed

log = logging.getLogger(__name__)


def host_memory_problems(config: TrainConfig, world_size: int, processes: int) -> list[str]:
    """One line where `processes` ranks need more memory than this machine has free; none where that is not known."""
    free = free_bytes()
    state, activations = sum(state_bytes(config, world_size).values()), _guessed_activations(config)
    if free is None or processes * (state + activations + PYTHON) < free / 4:
        return []
    if processes * state < 2 * free:  # not hopeless: replace the guess by a count on fake tensors
        activations = microbatch(config, "cpu").peak
    buffers = buffer_bytes(config, world_size, activations) + update_bytes(config, world_size, activations)
    need = processes * (state + activations + buffers + PYTHON)
    if need <= free:
        return []
    model, data = config.model, config.data
    return [
        f"the run needs {need / GIB:.1f} GiB of memory in {counted(processes, 'process')} (parameters, gradients and "
        f"optimizer {processes * state / GIB:.1f}, activations {processes * activations / GIB:.1f}), but this "
        f"machine has {free / GIB:.1f} GiB free: model={model.name}, data.micro_batch={data.micro_batch}, "
        f"data.sequence_length={data.sequence_length}; there is no GPU here, and model=demo is a model for a CPU"
    ]


def _guessed_activations(config: TrainConfig) -> float:
    """Bytes of one microbatch, in fp32, rounded up generously."""
    model, data = config.model, config.data
    token = model.layers * (16 * model.embed_dim + 6 * model.glu_dim) + 4 * model.vocab_size
    return 4.0 * data.micro_batch * data.sequence_length * token


def step_memory_problems(config: TrainConfig, world_size: int, processes: int) -> list[str]:
    """One line where the tokens and targets of one step, int64, which its ranks read before they begin it, are more
    than the memory that this machine has free; none where that is not known."""
    data, free = config.data, free_bytes()
    sequences = data.global_batch // (world_size // (config.parallel.tp * config.parallel.cp))
    need = processes * sequences * data.sequence_length * 16
    if free is None or need <= free:
        return []
    return [
        f"data.global_batch={data.global_batch} x data.sequence_length={data.sequence_length}: the tokens and targets "
        f"of a step need {need / GIB:.1f} GiB of memory in {counted(processes, 'process')}, but this machine has "
        f"{free / GIB:.1f} GiB free"
    ]


def cpu_cost(config: TrainConfig, processes: int, done: int = 0) -> str:
    """One line: seconds of a microbatch, timed on the first blocks of the model, and what that makes of a step and of
    the run. Empty for a run of less than about a minute.

    processes: ranks on this machine, which share its cores. done: steps of a run that goes on.
    """
    data, steps = config.data, max(config.last_step - done, 0)
    sequences = data.global_batch * steps
    flops = training_flops_per_token(config.model, data.sequence_length) * sequences * data.sequence_length
    guessed_s = flops / (CORE_FLOPS * torch.get_num_threads() * processes)
    if guessed_s < WORTH_TIMING_S:
        return ""
    if guessed_s * processes * data.micro_batch / sequences > WORTH_SAYING_S:
        tokens = data.micro_batch * data.sequence_length
        log.info("no GPU: a microbatch of %s tokens is timed, to say what the run will cost", f"{tokens:,}")
    one, two = (_seconds(config, config.model.shortened(layers)) for layers in (1, 2))
    microbatch = one + (config.model.layers - 1) * max(two - one, 0)
    step = microbatch * data.global_batch / data.micro_batch / processes
    about = "at least" if config.parallel.tp * config.parallel.cp > 1 else "about"  # a split pass has every operation
    return (
        f"no GPU: a microbatch takes about {microbatch:.2g} s, a step {step:.2g} s ({data.global_batch} sequences over "
        f"{counted(processes, 'process')}), {steps} steps {about} {_duration(step * steps)}"
    )


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 process", "2 processes", "3 threads"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def _seconds(config: TrainConfig, model_config: ModelConfig) -> float:
    """Seconds of forward and backward pass of one microbatch, timed after a warm-up pass of one sequence."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(model_config, ParallelContext(), "cpu", DTYPES[config.engine.precision])
        initialize(model, 0)
        for rows in (1, config.data.micro_batch):
            tokens = torch.zeros(rows, config.data.sequence_length, dtype=torch.int64)
            began = time.perf_counter()
            model(tokens, targets=tokens, reduction="sum").loss.backward()
    return time.perf_counter() - began


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
