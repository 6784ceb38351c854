"""Plan a run without starting it, and without a GPU: memory, traffic and time of a step, tokens/s, days.

python -m megatron_tn.plan model=7b parallel.tp=8 engine=zero1 cluster=a100_80g nodes=16
python -m megatron_tn.plan model=175b cluster=a100_80g nodes=64           the fastest layout that fits
python -m megatron_tn.plan model=65b cluster=h100_80g nodes=32 search=true   all layouts, by predicted throughput

Exit code 0 if the layout fits into the GPUs' memory, or that is not known, else 2; of a --multirun, 0 if one does.
docs/scaling.md.
"""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.table import Table

from megatron_tn.cli import BAD_INPUT, command
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ConfigError, PlanConfig
from megatron_tn.planning.batch import with_usual_batch
from megatron_tn.planning.estimate import GIB
from megatron_tn.planning.remedies import memory_problems
from megatron_tn.planning.report import Plan, make_plan, print_json, print_plan, print_search
from megatron_tn.planning.search import Candidate, names_a_layout, search
from megatron_tn.planning.speed import missing_rates

MULTIRUN = {"-m", "--multirun"}


@dataclass(frozen=True)
class Job:
    """A layout of a multirun: its overrides, and its plan or why there is none. json: whether JSON was asked for."""

    overrides: list[str]
    plan: Plan | None
    problems: list[str]
    json: bool

    def as_json(self) -> dict[str, Any]:
        found = self.plan.as_json() if self.plan else {"fits": False}
        return {"overrides": self.overrides} | found | {"problems": self.problems}


_jobs: list[Job] = []


def plan_of(config: PlanConfig, named: set[str]) -> tuple[Plan, list[Candidate]]:
    """The plan of the named layout, or of the fastest one that fits; and the layouts of a search.

    Raises:
        ConfigError: settings that contradict each other, or a search on a cluster that is not known.
    """
    world = config.nodes * max(config.cluster.gpus_per_node, 1)
    unknown = missing_rates(config.cluster)
    if not config.cluster.gpu_memory_gib:
        unknown.insert(0, "cluster.gpu_memory_gib")
    if config.search and unknown:
        raise ConfigError(f"search=true needs {', '.join(unknown)}: choose a cluster, such as cluster=a100_80g")
    chosen = "data.global_batch" not in named and "experiment" not in named and not unknown
    candidates: list[Candidate] = []
    if config.search or not (unknown or names_a_layout(named)):
        candidates = search(config, world, named)
        config = candidates[0].config
    elif problems := config.problems():
        raise ConfigError(problems)
    elif chosen:
        config = with_usual_batch(config, world)
    if problems := config.problems(world):
        raise ConfigError(problems)
    problems = memory_problems(config, world)
    logs = None
    if config.dry_run and config.optim.name == "muon" and config.engine.name != "deepspeed":
        raise ConfigError(
            f"dry_run=true cannot follow the update of optim.name=muon with engine.name={config.engine.name}: its "
            "ranks send each other which matrices they hold, and a dry run moves no values. Set optim=adamw, or "
            "engine.name=deepspeed"
        )
    if config.dry_run:
        from megatron_tn.planning.dry_run import dry_run  # imports the engines

        logs, wrong = dry_run(config, world)
        problems += wrong
    return make_plan(config, world, config.tokens, problems, chosen=chosen, logs=logs), candidates


def show(plan: Plan, candidates: list[Candidate], config: PlanConfig) -> None:
    if config.json:
        print_json(plan, candidates)
    else:
        out = table_console()
        if config.search:
            print_search(candidates, plan.world_size, out)
        print_plan(plan, out)
    if plan.problems:
        raise ConfigError(plan.problems)


def _run(config: PlanConfig) -> None:
    named = {word.lstrip("+~").partition("=")[0] for word in sys.argv[1:]}
    if not MULTIRUN & set(sys.argv):
        show(*plan_of(config, named), config)
        return
    overrides = [word for word in HydraConfig.get().overrides.task if not word.startswith("json=")]
    try:
        plan, _ = plan_of(config, named)
        _jobs.append(Job(overrides, plan, list(plan.problems), config.json))
    except ConfigError as error:
        _jobs.append(Job(overrides, None, error.problems, config.json))


def _show_jobs(run_dir: str, runs: list[str]) -> None:
    jobs = list(_jobs)
    _jobs.clear()
    if any(job.json for job in jobs):
        print(json.dumps([job.as_json() for job in jobs], indent=1))
    else:
        table_console().print(_table_of(jobs))
    if all(job.problems for job in jobs):
        sys.exit(BAD_INPUT)


def _table_of(jobs: list[Job]) -> Table:
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    table = Table("layout", "GiB", "tokens/s per GPU", "days", "why not")
    for job in jobs:
        cells = ["", "", ""]
        if job.plan is not None:
            time = job.plan.time
            cells = [f"{job.plan.memory.total / GIB:.1f}"]
            cells += [f"{time.tokens_per_second:,.0f}", f"{job.plan.days:,.1f}"] if time else ["", ""]
        # A table's cell has no room for the kinds of memory and the layout.
        short = (re.sub(r" \(.*; in GiB: ", "; in GiB: ", problem) for problem in job.problems)
        table.add_row(" ".join(word for word in job.overrides if word not in shared), *cells, "; ".join(short))
    return table


_command = command(PlanConfig, "plan", after_sweep=_show_jobs)(_run)


def main() -> None:
    sys.argv = ["json=true" if word == "--json" else word for word in sys.argv]
    _command()


if __name__ == "__main__":
    main()
