"""Changes of one setting that make a run fit into a GPU's memory, for the message that refuses one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_tn.config import TrainConfig
from megatron_tn.planning.estimate import GIB, MemoryPlan, plan_memory

Change = tuple[str, TrainConfig]  # words of the command line, and the config that they give


def changes_by_setting(config: TrainConfig) -> Iterator[list[Change]]:
    """For each setting that saves memory, its values in the order of what they cost in speed, the cheapest first."""
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
        # FSDP2 and ZeRO 3 shard the same; FSDP2 is the faster one (docs/performance.md).
        yield [*stages[:-1], with_engine("engine=fsdp2", name="fsdp2"), *stages[-1:]] if stages else []
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield [("parallel.sequence_parallel=true", replace(config, parallel=replace(parallel, sequence_parallel=True)))]
    for axis in ("tp", "cp"):
        sizes = [factor * getattr(parallel, axis) for factor in (2, 4, 8)]
        yield [
            (f"parallel.{axis}={size}", replace(config, parallel=replace(parallel, **{axis: size}))) for size in sizes
        ]


def all_at_once(config: TrainConfig) -> Change:
    """The least that a rank can need in this layout."""
    engine = replace(config.engine, recompute="full", recompute_every=1)
    words = "data.micro_batch=1 engine.recompute=full"
    if engine.name == "deepspeed" and engine.zero_stage < 3:
        engine, words = replace(engine, zero_stage=3), f"{words} engine=zero3"
    return words, replace(config, engine=engine, data=replace(config.data, micro_batch=1))


def remedies(config: TrainConfig, world_size: int) -> list[tuple[str, MemoryPlan]]:
    """For each setting, the first value whose plan fits cluster.gpu_memory_gib. Where no setting alone is enough, all
    of them at once; where even that is not, the change that comes nearest."""
    limit = config.cluster.gpu_memory_gib * GIB
    plans: list[tuple[str, MemoryPlan]] = []

    def first_that_fits(changes: list[Change]) -> tuple[str, MemoryPlan] | None:
        for words, changed in changes:
            if not changed.problems(world_size):
                plans.append((words, plan_memory(changed, world_size)))
                if plans[-1][1].total <= limit:
                    return plans[-1]
        return None

    fitting = [found for changes in changes_by_setting(config) if (found := first_that_fits(changes))]
    if not fitting and (found := first_that_fits([all_at_once(config)])):
        fitting = [found]
    return fitting or sorted(plans, key=lambda pair: pair[1].total)[:1]


def memory_problems(config: TrainConfig, world_size: int) -> list[str]:
    """One line that says what a rank needs, what there is and what would fit; none if the run fits, or if
    cluster.gpu_memory_gib=0 (not known). The settings must be free of other problems."""
    limit = config.cluster.gpu_memory_gib
    if limit <= 0:
        return []
    plan = plan_memory(config, world_size)
    if plan.total <= limit * GIB:
        return []
    kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in plan.kinds.items() if size >= 0.05 * GIB)
    found = remedies(config, world_size)
    offered = "; ".join(f"{words} needs {better.total / GIB:.1f}" for words, better in found)
    if found and found[0][1].total > limit * GIB:
        offered = f"nothing tried is enough, the closest is {offered}: take more nodes"
    engine, parallel, data = config.engine, config.parallel, config.data
    return [
        f"a rank needs {plan.total / GIB:.1f} GiB, but cluster.gpu_memory_gib={limit} ({kinds}), with parallel.tp="
        f"{parallel.tp}, parallel.cp={parallel.cp}, parallel.sequence_parallel="
        f"{str(parallel.sequence_parallel).lower()}, engine.name={engine.name}, engine.zero_stage={engine.zero_stage}, "
        f"engine.recompute={engine.recompute}, data.micro_batch={data.micro_batch}, data.sequence_length="
        f"{data.sequence_length}; in GiB: {offered or 'none'}"
    ]
