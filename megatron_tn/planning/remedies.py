"""Changes of settings that make a run fit into GPU memory, for the error message of a run that does not fit."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_tn.config import TrainConfig
from megatron_tn.planning.estimate import GIB, MemoryPlan, plan_memory
from megatron_tn.planning.microbatch import extrapolated_in_rows
from megatron_tn.planning.search import layout_words

Change = tuple[str, TrainConfig]  # command-line overrides, and the resulting config


def changes_by_setting(config: TrainConfig) -> Iterator[list[Change]]:
    """For each setting that saves memory: its values, those that cost the least speed first."""
    engine, data, parallel = config.engine, config.data, config.parallel

    def with_engine(words: str, **changes: object) -> Change:
        return words, replace(config, engine=replace(engine, **changes))

    smaller = [data.micro_batch >> halvings for halvings in range(1, data.micro_batch.bit_length())]
    yield [(f"data.micro_batch={rows}", replace(config, data=replace(data, micro_batch=rows))) for rows in smaller]
    policies = ["selective", "full"] if engine.recompute == "none" else ["full"]
    yield [
        with_engine(f"engine.recompute={policy}", recompute=policy, recompute_every=1)
        for policy in policies
        if (engine.recompute, engine.recompute_every) != (policy, 1)
    ]
    if engine.name == "deepspeed":
        stages = [with_engine(f"engine=zero{stage}", zero_stage=stage) for stage in range(engine.zero_stage + 1, 4)]
        # FSDP2 and ZeRO 3 shard the same tensors; FSDP2 is faster (docs/performance.md).
        yield [*stages[:-1], with_engine("engine=fsdp2", name="fsdp2"), *stages[-1:]] if stages else []
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield [("parallel.sequence_parallel=true", replace(config, parallel=replace(parallel, sequence_parallel=True)))]
    for axis in ("tp", "cp"):
        sizes = larger_tensor_parallel(config) if axis == "tp" else [factor * parallel.cp for factor in (2, 4, 8)]
        yield [
            (f"parallel.{axis}={size}", replace(config, parallel=replace(parallel, **{axis: size}))) for size in sizes
        ]


def larger_tensor_parallel(config: TrainConfig) -> list[int]:
    """Within a node, where its GPUs are known: a plan warns of tensor parallelism beyond it."""
    sizes, node = [factor * config.parallel.tp for factor in (2, 4, 8)], config.cluster.gpus_per_node
    return [size for size in sizes if not node or size <= node]


def combinations(config: TrainConfig) -> Iterator[Change]:
    """All changes at once, for this tensor parallelism and for larger ones: the lowest memory per rank for each."""
    for size in (config.parallel.tp, *larger_tensor_parallel(config)):
        words, parallel = "data.micro_batch=1 engine.recompute=full", config.parallel
        if size > parallel.tp:
            words = f"parallel.tp={size} parallel.sequence_parallel=true {words}"
            parallel = replace(parallel, tp=size, sequence_parallel=True)
        engine = replace(config.engine, recompute="full", recompute_every=1)
        changed = replace(config, parallel=parallel, engine=engine, data=replace(config.data, micro_batch=1))
        if engine.name == "deepspeed" and engine.zero_stage < 3:
            yield f"{words} engine=zero3", replace(changed, engine=replace(engine, zero_stage=3))
            yield f"{words} engine=fsdp2", replace(changed, engine=replace(engine, name="fsdp2"))
        elif changed != config:
            yield words, changed


def remedies(config: TrainConfig, world_size: int) -> list[tuple[str, MemoryPlan]]:
    """For each setting, the first value whose plan fits cluster.gpu_memory_gib. If no single setting is enough: the
    first of `combinations` that fits; if none does: the change with the smallest plan. A few layers tell
    of all: 175B on 512 GPUs takes 6 s of one core instead of a minute."""
    limit = config.cluster.gpu_memory_gib * GIB
    plans: list[tuple[str, MemoryPlan]] = []

    def first_that_fits(changes: list[Change]) -> tuple[str, MemoryPlan] | None:
        for words, changed in changes:
            if not changed.problems(world_size):
                plans.append((words, plan_memory(changed, world_size, extrapolated_in_rows)))
                if plans[-1][1].total <= limit:
                    return plans[-1]
        return None

    fitting = [found for changes in changes_by_setting(config) if (found := first_that_fits(changes))]
    if not fitting and (found := first_that_fits(list(combinations(config)))):
        fitting = [found]
    return fitting or sorted(plans, key=lambda pair: pair[1].total)[:1]


def memory_problems(config: TrainConfig, world_size: int) -> list[str]:
    """One line with the memory a rank needs, the GPU's memory and the settings that fit; [] if the run fits or
    cluster.gpu_memory_gib=0 (not known). `config.problems(world_size)` must be empty."""
    limit = config.cluster.gpu_memory_gib
    if limit <= 0:
        return []
    plan = plan_memory(config, world_size)
    if plan.total <= limit * GIB:
        return []
    kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in plan.kinds.items() if size >= 0.05 * GIB)
    found = remedies(config, world_size)
    offered = "; ".join(f"{words} needs {better.total / GIB:.1f}" for words, better in found)
    if not found or found[0][1].total >= 0.999 * plan.total:  # they follow a few layers
        offered = "nothing tried needs less: take more nodes"
    elif found and found[0][1].total > limit * GIB:
        offered = f"nothing tried is enough, the closest is {offered}: take more nodes"
    return [
        f"a rank needs {plan.total / GIB:.1f} GiB, but cluster.gpu_memory_gib={limit} ({kinds}), with "
        f"{layout_words(config)} data.sequence_length={config.data.sequence_length}; in GiB: {offered}"
    ]
