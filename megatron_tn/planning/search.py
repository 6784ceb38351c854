"""Ranks layouts of a model on a cluster by predicted throughput, and gives the reason why others are left out.

Layouts differ in tensor and context parallelism, sequence parallelism, engine, recomputation policy and microbatch.
A setting that the command line names stays as it is.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from megatron_tn.config import ConfigError, EngineConfig, TrainConfig
from megatron_tn.config.model import SOFTMAX_KINDS
from megatron_tn.planning.batch import usual_tokens, with_usual_batch
from megatron_tn.planning.estimate import GIB, plan_memory
from megatron_tn.planning.microbatch import extrapolated_in_rows, microbatch
from megatron_tn.planning.speed import StepTime, step_time

ENGINES = {
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "fsdp2": {"name": "fsdp2", "zero_stage": 1},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}
POLICIES = ("none", "selective", "full")  # the fastest first
LEAST_SLICE = 4096  # tokens of a slice: shorter sequences are not cut
MOST_TOKENS = 32768  # most tokens of a microbatch: products are at full rate long before
MOST_BATCH = 2.0  # times the usual batch, when the batch is free
SHARED = "parallel.sequence_parallel"  # goes with any parallel.tp > 1, so it leaves the layout open
LAYOUT = ("parallel", "engine", "experiment", "data.micro_batch")  # settings that name a layout


@dataclass(frozen=True)
class Candidate:
    """A layout, its bytes on a rank and its step; `reason`: why it is not taken, "" for one that fits.

    memory, time: None for a layout that the settings' relations refuse.
    """

    config: TrainConfig
    memory: int | None
    time: StepTime | None
    reason: str = ""

    @property
    def words(self) -> str:
        return layout_words(self.config)

    @property
    def order(self) -> tuple[bool, float]:
        """Fitting ones first, the fastest first; then those that do not fit, the leanest first."""
        if self.reason:
            return True, math.inf if self.memory is None else self.memory
        return False, -self.time.tokens_per_second


def names_a_layout(named: Collection[str]) -> bool:
    return any(word.startswith(LAYOUT) and word != SHARED for word in named)


def layout_words(config: TrainConfig) -> str:
    """The overrides that make this layout."""
    engine, parallel, data = config.engine, config.parallel, config.data
    words = [f"parallel.tp={parallel.tp}", f"parallel.cp={parallel.cp}"]
    if parallel.tp > 1:
        words.append(f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}")
    words += [f"engine={engine_word(engine)}", f"engine.recompute={engine.recompute}"]
    return " ".join([*words, f"data.micro_batch={data.micro_batch}", f"data.global_batch={data.global_batch}"])


def engine_word(engine: EngineConfig) -> str:
    return f"zero{engine.zero_stage}" if engine.name == "deepspeed" else engine.name


def search(config: TrainConfig, world_size: int, named: Collection[str]) -> list[Candidate]:
    """Layouts that fit, the fastest first, and then those that do not. named: settings of the command line.

    The first one's memory and time are of all its layers; the others' may be extrapolated from a few.

    Raises:
        ConfigError: the settings go with no layout, however much memory there is.
    """
    layouts = [each.problems() for each in parallel_layouts(config, world_size, named)] or [config.problems()]
    if problems := min(layouts, key=len):  # those that no tensor or context parallelism mends
        raise ConfigError(problems)
    found: list[Candidate] = []
    for parallel in parallel_layouts(config, world_size, named):
        for rows in _microbatch_sizes(parallel, named):
            tried = list(_by_policy(rows, world_size, named))
            found += tried
            if all(candidate.reason for candidate in tried):
                break  # a larger microbatch needs more memory
    if all(each.memory is None for each in found):
        raise ConfigError(_refusal(found, world_size))
    found.sort(key=lambda candidate: candidate.order)
    if not found[0].reason and found[0].config.parallel.tp > 1 and not _fixes_slices(named):
        # Without slices of tokens every rank repeats the norms and keeps all tokens, but the backward pass gathers
        # nothing again: compared for the best layout alone.
        parallel = replace(found[0].config.parallel, sequence_parallel=False)
        found.append(_evaluated(replace(found[0].config, parallel=parallel), world_size, named))
        found.sort(key=lambda candidate: candidate.order)
    while not found[0].reason:
        found[0] = _evaluated(found[0].config, world_size, named, work_of=microbatch)
        if not found[0].reason:
            break
        found.append(found.pop(0))
    return sorted(found, key=lambda candidate: candidate.order)


def _refusal(found: list[Candidate], world_size: int) -> str:
    """Why none of `found` goes with the settings: the reason of the one with the fewest data-parallel ranks."""

    def ranks(candidate: Candidate) -> int:
        return candidate.config.parallel.tp * candidate.config.parallel.cp

    last = max([each for each in found if world_size % ranks(each) == 0] or found[:1], key=ranks)
    reason, config = last.reason.removeprefix("divisibility: "), last.config
    if len(set(map(ranks, found))) == 1:
        return reason
    return (
        f"no division of nodes={config.nodes} x cluster.gpus_per_node={config.cluster.gpus_per_node} goes with the "
        f"settings; with parallel.tp={config.parallel.tp}, parallel.cp={config.parallel.cp}: {reason}"
    )


def _fixes_slices(named: Collection[str]) -> bool:
    return _fixes(named, "parallel") or SHARED in named


def parallel_layouts(config: TrainConfig, world_size: int, named: Collection[str]) -> Iterator[TrainConfig]:
    """Tensor parallel within a node, and context parallel where a slice has at least LEAST_SLICE tokens."""
    parallel, node = config.parallel, config.cluster.gpus_per_node
    whole = _fixes(named, "parallel")
    tps = [parallel.tp] if whole or "parallel.tp" in named else _powers(min(node, world_size))
    cps = [parallel.cp] if whole or "parallel.cp" in named else _powers(config.data.sequence_length // LEAST_SLICE)
    for tp, cp in itertools.product(tps, cps):
        if cp > 1 and set(config.model.mixers) & set(SOFTMAX_KINDS):
            continue
        shared = parallel.sequence_parallel if _fixes_slices(named) else tp > 1
        yield replace(config, parallel=replace(parallel, tp=tp, cp=cp, sequence_parallel=shared))


def _microbatch_sizes(config: TrainConfig, named: Collection[str]) -> Iterator[TrainConfig]:
    data = config.data
    if "data.micro_batch" in named:
        yield config
        return
    for rows in _powers(MOST_TOKENS * config.parallel.cp // data.sequence_length):
        yield replace(config, data=replace(data, micro_batch=rows))


def _by_policy(config: TrainConfig, world_size: int, named: Collection[str]) -> Iterator[Candidate]:
    """Each engine with the lightest recomputation that fits, and the lighter ones that do not."""
    engine = config.engine
    fixed = _fixes(named, "engine") or {"engine.name", "engine.zero_stage"} & set(named)
    engines = {engine_word(engine): {}} if fixed else ENGINES
    policies = [engine.recompute] if "engine.recompute" in named else POLICIES
    fitting: set[str] = set()
    for policy, (word, changes) in itertools.product(policies, engines.items()):
        if word not in fitting:
            variant = replace(config, engine=replace(engine, recompute=policy, **changes))
            candidate = _evaluated(variant, world_size, named)
            yield candidate
            if not candidate.reason or candidate.time is None:
                fitting.add(word)


def _evaluated(
    config: TrainConfig, world_size: int, named: Collection[str], work_of: Callable = extrapolated_in_rows
) -> Candidate:
    if "data.global_batch" not in named:
        config = with_usual_batch(config, world_size)
        tokens = config.data.global_batch * config.data.sequence_length
        free = config.data.micro_batch > 1 and "data.micro_batch" not in named
        if free and tokens > MOST_BATCH * usual_tokens(config):
            return Candidate(config, None, None, f"batch: {tokens / 1e6:.1f} M tokens at least")
    if problems := config.problems(world_size):
        return Candidate(config, None, None, f"divisibility: {problems[0]}")
    memory = plan_memory(config, world_size, work_of).total
    time = step_time(config, world_size, work_of(config))
    limit = config.cluster.gpu_memory_gib
    reason = f"memory: {memory / GIB:.1f} GiB of {limit}" if memory > limit * GIB else ""
    return Candidate(config, memory, time, reason)


def _fixes(named: Collection[str], group: str) -> bool:
    return group in named or "experiment" in named


def _powers(most: int) -> list[int]:
    """1, 2, 4, .. up to `most`."""
    return [1 << power for power in range(max(most, 1).bit_length())]
