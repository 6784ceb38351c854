"""A plan as one value, printed as tables or as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_tn.config import TrainConfig
from megatron_tn.model.registry import forward_flops_per_token, parameter_count, training_flops_per_token
from megatron_tn.planning.batch import REASON, is_far
from megatron_tn.planning.collectives import Call
from megatron_tn.planning.concerns import checkpoint_bytes, checkpoint_seconds, concerns
from megatron_tn.planning.estimate import GIB, MemoryPlan, plan_memory
from megatron_tn.planning.microbatch import microbatch
from megatron_tn.planning.pipeline import best_pipeline
from megatron_tn.planning.search import Candidate, engine_word, layout_words
from megatron_tn.planning.speed import CONTENTION, MEMORY_SHARE, StepTime, missing_rates, step_time
from megatron_tn.planning.traffic import Traffic, step_traffic

TOKENS_A_PARAMETER = 20  # arXiv 2203.15556
AXES = {"data": "data x context", "world": "all ranks"}


@dataclass(frozen=True)
class Plan:
    """time: None where the cluster's rates are not known. problems: why the layout does not fit, [] if it does."""

    config: TrainConfig
    world_size: int
    tokens: int
    memory: MemoryPlan
    traffic: Sequence[Traffic]
    time: StepTime | None
    problems: Sequence[str]
    chosen: bool = False  # whether the batch is the usual one, since none was named
    logs: Mapping[int, Sequence[Call]] | None = None  # of a dry run: rank -> its collectives

    @property
    def days(self) -> float | None:
        """Days that the token budget takes, without pauses, evaluations and failures."""
        return self.time and self.tokens / (self.time.tokens_per_second * self.world_size) / 86400

    @property
    def gpu_hours(self) -> float | None:
        return self.days and 24 * self.days * self.world_size

    @property
    def warnings(self) -> list[str]:
        return list(concerns(self.config, self.time))

    @property
    def assumptions(self) -> list[str]:
        cluster = self.config.cluster
        if self.time is None:
            return [f"no time without {', '.join(missing_rates(cluster))}; cluster=a100_80g and others have them"]
        rates = ", ".join(f"{rate:g} from {size:g} on" for size, rate in cluster.matrix_rates)
        lines = [
            f"matrix products: TFLOP/s by the smallest dimension, {rates} (cluster.matrix_rates)",
            f"other kernels: {MEMORY_SHARE:.0%} of cluster.memory_bandwidth_gbs={cluster.memory_bandwidth_gbs:g}",
            f"NVLink {cluster.nvlink_gbs:g} GB/s, network {cluster.interconnect_gbs:g} GB/s a GPU and direction, "
            f"{cluster.latency_us:g} us a collective; beside products a collective costs {CONTENTION:.0%} of its time "
            "over NVLink",
            "reductions wait for the network alone where the last backward pass, or a microbatch, is shorter",
            "the host launches ahead of the GPU, data is there, and no rank is slower than another",
            f"days: {self.tokens:,} tokens without pauses, evaluations and failures",
        ]
        if self.config.optim.name == "muon":
            lines.append("optim.name=muon: the rank with most matrices; nothing hides their exchange")
        if self.chosen:
            least = "one microbatch of each data-parallel rank, since none smaller can be split over them"
            lines.append(
                f"data.global_batch={self.config.data.global_batch}: {least if is_far(self.config) else REASON}"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        config, time = self.config, self.time
        found = {
            "model": config.model.name,
            "parameters": parameter_count(config.model),
            "cluster": config.cluster.name,
            "processes": self.world_size,
            "layout": layout_words(config),
            "fits": not self.problems if config.cluster.gpu_memory_gib or self.problems else None,
            "problems": list(self.problems),
            "memory_bytes": self.memory.kinds | {"all": self.memory.total},
            "memory_limit_bytes": int(config.cluster.gpu_memory_gib * GIB),
            "traffic": [dataclasses.asdict(each) for each in self.traffic],
            "checkpoint_bytes": checkpoint_bytes(config),
            "checkpoint_seconds": checkpoint_seconds(config),
            "tokens": self.tokens,
            "warnings": self.warnings,
            "assumptions": self.assumptions,
        }
        if self.logs is not None:
            found["dry_run"] = {str(rank): [call._asdict() for call in calls] for rank, calls in self.logs.items()}
        if time is not None:
            found |= {
                "step_seconds": time.kinds | {"all": time.total},
                "tokens_per_second_per_gpu": time.tokens_per_second,
                "utilisation_datasheet": time.utilisation(config),
                "days": self.days,
                "gpu_hours": self.gpu_hours,
            }
        return found


def make_plan(
    config: TrainConfig,
    world_size: int,
    tokens: int,
    problems: Sequence[str] = (),
    *,
    chosen: bool,
    logs: Mapping[int, Sequence[Call]] | None = None,
) -> Plan:
    """The plan of a layout. tokens: the budget; 0: TOKENS_A_PARAMETER a parameter. chosen, logs: see `Plan`."""
    work = microbatch(config)
    time = None if missing_rates(config.cluster) else step_time(config, world_size, work)
    tokens = tokens or TOKENS_A_PARAMETER * parameter_count(config.model)
    traffic = step_traffic(config, world_size, work)
    return Plan(config, world_size, tokens, plan_memory(config, world_size), traffic, time, problems, chosen, logs)


def print_json(plan: Plan, candidates: Sequence[Candidate]) -> None:
    found = plan.as_json()
    if candidates:
        found["search"] = [
            {
                "layout": each.words,
                "memory_bytes": each.memory,
                "tokens_per_second_per_gpu": each.time and each.time.tokens_per_second,
                "reason": each.reason,
            }
            for each in candidates
        ]
    print(json.dumps(found, indent=1))


def print_plan(plan: Plan, console: Console) -> None:
    config, world = plan.config, plan.world_size
    tp, cp = config.parallel.tp, config.parallel.cp
    layout = f"{world} processes: tp {tp} x cp {cp} x dp {world // (tp * cp)}"
    console.print(f"{config.model.name}: {parameter_count(config.model):,} parameters; {layout}")
    console.print(layout_words(config))
    memory = Table("peak memory, per rank", "GiB", title_justify="left")
    for kind, size in plan.memory.kinds.items():
        memory.add_row(kind, f"{size / GIB:.2f}")
    memory.add_section()
    memory.add_row("reserved by the allocator", f"{plan.memory.reserved / GIB:.2f}")
    memory.add_row("all", f"{plan.memory.total / GIB:.2f}")
    console.print(memory)
    flops = Table("operations", "GFLOP a token")
    training_flops = training_flops_per_token(config.model, config.data.sequence_length)
    for part, count in forward_flops_per_token(config.model, config.data.sequence_length).items():
        flops.add_row(part, f"{count / 1e9:.3f}")
    flops.add_row("forward and backward", f"{training_flops / 1e9:.3f}")
    console.print(flops)
    if plan.traffic:
        traffic = Table("collectives of a step, per rank", "over", "calls", "GB by NVLink", "GB by network", "beside")
        for each in plan.traffic:
            over = f"{each.kind}, {AXES.get(each.axis, each.axis)}"
            sizes = (f"{size / 1e9:.2f}" for size in (each.nvlink, each.network))
            traffic.add_row(each.name, over, f"{each.calls:,}", *sizes, each.beside)
        console.print(traffic)
    if plan.time is not None:
        console.print(_time_table(plan, plan.time))
    size, seconds = checkpoint_bytes(config), checkpoint_seconds(config)
    writing = "" if seconds is None else f", {seconds:.0f} s to write at {config.cluster.storage_gbs:g} GB/s a node"
    console.print(f"a checkpoint: {size / 1e9:,.0f} GB{writing}")
    if plan.logs is not None:
        console.print(_dry_run_line(plan))
    for line in plan.assumptions:
        console.print(f"assumed: {line}")
    for line in plan.warnings:
        console.print(f"warning: {line}")


def _time_table(plan: Plan, time: StepTime) -> Table:
    table = Table("a step", "s")
    for kind, seconds in time.kinds.items():
        table.add_row(kind, f"{seconds:.3f}")
    table.add_section()
    table.add_row("all", f"{time.total:.3f}")
    table.add_row("tokens/s per GPU", f"{time.tokens_per_second:,.0f}")
    table.add_row("of the datasheet's bf16 peak", f"{time.utilisation(plan.config):.1%}")
    table.add_row(f"days for {plan.tokens / 1e9:,.0f} billion tokens", f"{plan.days:,.1f}")
    table.add_row("GPU hours", f"{plan.gpu_hours:,.0f}")
    return table


def _dry_run_line(plan: Plan) -> str:
    sizes: dict[str, list[int]] = {}
    for call in next(iter(plan.logs.values())):
        sizes.setdefault(f"{call.kind} over {len(call.ranks)}", []).append(call.size)
    made = ", ".join(f"{len(each)} {name} ({sum(each) / 1e9:.2f} GB)" for name, each in sizes.items())
    outcome = "agree" if not plan.problems else "were run"
    ranks = ", ".join(map(str, plan.logs))
    return f"dry run of one microbatch: ranks {ranks} of {plan.world_size} {outcome}; rank 0 made {made}"


def print_search(candidates: Sequence[Candidate], world_size: int, console: Console) -> None:
    """The best layout of each tp x cp x engine; of one that never fits, the leanest."""
    table = Table(
        "tp", "cp", "sp", "engine", "recompute", "rows", "tokens/s", "GiB", "slower than the first, or why not"
    )
    best: dict[tuple, Candidate] = {}
    for each in candidates:
        key = (each.config.parallel, engine_word(each.config.engine))
        if key not in best or (best[key].reason and (each.memory or 0) < (best[key].memory or 0)):
            best[key] = each
    for each in best.values():
        parallel, engine = each.config.parallel, each.config.engine
        cells = [str(parallel.tp), str(parallel.cp), "yes" if parallel.sequence_parallel else "", engine_word(engine)]
        cells += [engine.recompute, str(each.config.data.micro_batch)]
        cells += [f"{each.time.tokens_per_second:,.0f}", f"{each.memory / GIB:.1f}"] if each.time else ["", ""]
        table.add_row(*cells, each.reason or slower_by(each.time, candidates[0].time))
    console.print(table)
    first = candidates[0]
    if not first.reason and (pipeline := best_pipeline(first.config, world_size)) is not None:
        console.print(
            f"for comparison, pipeline parallel, which this package does not have: tp {first.config.parallel.tp} x "
            f"{pipeline.stages} stages, ZeRO 1, recompute {pipeline.recompute}, {pipeline.rows} rows: "
            f"{pipeline.tokens_per_second:,.0f} tokens/s, {pipeline.memory / GIB:.1f} GiB, bubble {pipeline.bubble:.1%}"
        )
    fitting = sum(not each.reason for each in candidates)
    console.print(f"{fitting} layouts fit, {len(candidates) - fitting} do not: of each engine the best; --json has all")


def slower_by(time: StepTime, best: StepTime) -> str:
    """Loss of tokens/s against `best` in per cent, and the part of the step that adds most time per token."""
    lost = 1 - time.tokens_per_second / best.tokens_per_second
    if lost < 0.001:
        return ""
    more = {
        kind: seconds / time.tokens_per_gpu - best.kinds[kind] / best.tokens_per_gpu
        for kind, seconds in time.kinds.items()
    }
    return f"{lost:.1%}: {max(more, key=more.get)}"
