"""Submit a training run to SLURM: everything that needs no GPU is checked first, and the settings are frozen.

    python -m launch.submit model=7b parallel.tp=8 cluster=a100_80g nodes=16 slurm.time=24:00:00 \
        data.manifest=... run_dir=runs/7b
    python -m launch.submit ... dry_run=true                         write and show everything, and do not submit
    python -m launch.submit --multirun optim.lr=1e-4,3e-4 ...        a sweep: one job array, one run folder a task
    python -m launch.submit ... slurm.chain=0 slurm.tokens=300e9     jobs one after the other until so many tokens
    python -m launch.submit --comment=mine -- model=7b ...           more options for sbatch, before --

All problems are reported at once, with exit code 2. The run's folder then has submitted/TIME/: the settings, which the
job trains with whatever happens to YAML files, the code's revision and diff, the packages, and the job's script, which
`sbatch` takes as well. Settings: `--help`, docs/operations.md. The exit code is sbatch's.
"""

import dataclasses
import getpass
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from data_pipeline.shards.remote import few_attempts
from launch.submission.checks import HOUR, Checked, check, disk_problems
from launch.submission.provenance import Code, code, packages, without_secrets
from launch.submission.script import job_name, job_number, script
from megatron_tn.cli import bad_input_exits, closed_pipe_exits, command, unusable_files_are_named
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ConfigError, storable
from megatron_tn.config.slurm import SubmitConfig
from megatron_tn.planning.estimate import GIB
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.submission import Submission
from megatron_tn.training.summary import engine_in_words

SWEEP = {"-m", "--multirun"}
SBATCH = ("sbatch", "--parsable")
SHAPE = ("nodes", "cluster", "slurm", "dry_run")  # settings that all tasks of a job array share


configs: list[SubmitConfig] = []  # of the runs of one command line, as `compose` finds them


def collect(config: SubmitConfig) -> None:
    configs.append(config)


compose = command(SubmitConfig, "submit")(collect)


def main() -> None:
    typed = sys.argv[1:]
    end = typed.index("--") if "--" in typed else 0
    options, words = typed[:end], typed[end + 1 :] if "--" in typed else typed
    if not words:
        print(__doc__)
        sys.exit(2)
    configs.clear()
    sys.argv[1:] = words
    with bad_input_exits(), unusable_files_are_named(), closed_pipe_exits():
        if any(word.startswith("hydra/launcher") for word in words):
            raise ConfigError(
                "hydra/launcher: a sweep of launch.submit is a job array; the launcher is one of training"
            )
        compose()
        if configs:
            sys.exit(submit(configs.copy(), options, typed, array=bool(SWEEP & set(words))))


def submit(configs: Sequence[SubmitConfig], options: list[str], typed: list[str], *, array: bool) -> int:
    """Check, write, show, submit. options: for sbatch, before those of the settings. typed: the command line.

    Raises:
        ConfigError: with every problem of every run.
    """
    with few_attempts():
        runs = [check(_with_options(config, options)) for config in configs]
    problems = [problem for run in runs for problem in run.problems]
    first, full = runs[0].config, disk_problems(runs)
    problems += [] if first.dry_run else full  # a dry run may be on a machine without the run's file system
    if any(getattr(run.config, name) != getattr(first, name) for run in runs for name in SHAPE):
        problems.append(f"a sweep is one job array, whose tasks share {', '.join(SHAPE)}: submit other shapes apart")
    if not first.dry_run and shutil.which("sbatch") is None:
        problems.append("no sbatch on this machine: it is no SLURM login node (dry_run=true writes the job's script)")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    folder = RunFolder(Path(first.run_dir).parent if array else first.run_dir)
    submission = Submission.new(folder)
    state = code()
    settings = _freeze(runs, submission, array=array)
    text = script(first, submission, settings, state.revision, array=array)
    submission.write(Submission.SCRIPT, text)
    submission.write("packages.txt", packages())
    if state.diff:
        submission.write("code.diff", state.diff)
    show(runs, submission, state, options, full, array=array)
    record = {
        "time": time.time(),
        "user": getpass.getuser(),
        "command": [without_secrets(storable(word)) for word in typed],
        "revision": state.revision,
        "nodes": first.nodes,
        "world_size": first.world_size,
        "runs": [run_dir for run_dir, _ in settings],
        "jobs": [],
    }
    submission.record(record)
    if first.dry_run:
        print(f"dry_run=true: not submitted; sbatch {shlex.quote(str(submission.script))} submits it")
        return 0
    return _sbatch(first, submission, options, record)


def _with_options(config: SubmitConfig, options: list[str]) -> SubmitConfig:
    """The config with the nodes, processes and time limit that options for sbatch ask for: options win over
    settings."""
    slurm = config.slurm
    for option in options:
        name, _, value = option.partition("=")
        if not value.split(":")[-1].isdecimal():
            continue
        number = int(value.split(":")[-1])
        if name == "--nodes":
            config = dataclasses.replace(config, nodes=number)
        elif name in ("--gres", "--gpus-per-node", "--ntasks-per-node"):
            slurm = dataclasses.replace(slurm, processes_per_node=number)
        elif name == "--time":
            slurm = dataclasses.replace(slurm, time=value)
    return dataclasses.replace(config, slurm=slurm)


def _freeze(runs: Sequence[Checked], submission: Submission, *, array: bool) -> list[tuple[str, Path]]:
    """Write each run's settings; returns run_dir, absolute, and their file."""
    found = []
    for run in runs:
        folder = RunFolder(run.config.run_dir)
        own = Submission.new(folder, submission.name) if array else submission
        own.freeze(run.config.train)
        found.append((str(folder.path.absolute()), own.config_file))
    return found


def _sbatch(config: SubmitConfig, submission: Submission, options: list[str], record: dict) -> int:
    """Submit the chain's jobs. Every job waits for all before it: a job that is cancelled while it waits has ended, and
    would let the next one start beside the one that runs."""
    for _ in range(config.slurm.chain):
        words = list(SBATCH)
        if config.slurm.chain > 1 and config.slurm.dependency == "singleton":
            words.append("--dependency=singleton")
        elif record["jobs"]:
            words.append(f"--dependency=afterany:{':'.join(record['jobs'])}")
        done = subprocess.run(
            [*words, *options, str(submission.script)], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            if record["jobs"]:
                print(f"submitted before that: scancel {' '.join(record['jobs'])} takes them back", file=sys.stderr)
            return done.returncode
        record["jobs"].append(job_number(done.stdout))
        submission.record(record)
    jobs = record["jobs"]
    print(f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {' '.join(jobs)}, one after the other", end="")
    print(f"; log: {submission.path}/; python -m launch.status {shlex.quote(str(submission.run_dir))} follows")
    return 0


def show(
    runs: Sequence[Checked],
    submission: Submission,
    state: Code,
    options: Sequence[str],
    full: Sequence[str],
    *,
    array: bool,
) -> None:
    """One table of what will run, and the command, the tasks and notes below it. full: notes of the disk."""
    run, config = runs[0], runs[0].config
    slurm, figures = config.slurm, run.outline
    tp, cp, world = config.parallel.tp, config.parallel.cp, config.world_size
    rows = {
        "job": job_name(config, submission) + (f", an array of {len(runs)} runs" if array else ""),
        "nodes": f"{config.nodes} x {config.processes_per_node} "
        + (f"GPUs ({config.cluster.name})" if config.cluster.gpus_per_node else f"processes ({config.cluster.name})"),
        "layout": f"{world} processes: tp {tp} x cp {cp} x dp {world // (tp * cp)}",
        "engine": engine_in_words(config),
        "parameters": f"{figures.parameters:,} ({config.model.name})",
        "tokens a step": f"{figures.tokens_a_step:,}",
        "steps": f"{figures.step + 1:,} to {figures.last_step:,}",
        "tokens": f"{figures.tokens:,}, {run.epochs:.2f} epochs of {storable(config.data.manifest)}",
        "memory of a GPU": _memory(run),
        "disk": f"{figures.checkpoint_bytes / GIB:.1f} GiB a checkpoint",
        "time": _duration(run),
        "requeued": f"after a failure, {slurm.failures} times without a new checkpoint" if slurm.requeue else "no",
        "code": (state.revision[:12] or "no git checkout") + (", with changes: code.diff" if state.diff else ""),
        "run folder": str(submission.run_dir),
    }
    table = Table(show_header=False, title="to submit", title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    table_console().print(table)
    print(f"command: {shlex.join([*SBATCH, *options, str(submission.script)])}")
    for task, other in enumerate(runs if array else ()):
        print(f"task {task}: {other.config.run_dir}")
    for note in dict.fromkeys([*full, *(note for one in runs for note in one.notes)]):
        print(f"note: {note}")
    sys.stdout.flush()


def _memory(run: Checked) -> str:
    plan = run.outline.memory
    return f"{plan.total / GIB:.1f} GiB of {run.config.cluster.gpu_memory_gib:g}" if plan else ""


def _duration(run: Checked) -> str:
    slurm = run.config.slurm
    limit = f"jobs of {slurm.time}" if slurm.time else "jobs of the cluster's default time limit"
    if slurm.chain > 1:
        limit = f"{slurm.chain} {limit}, one after the other ({slurm.dependency})"
    if run.seconds is None:
        return limit
    by = "by plan" if run.outline.time else f"at {slurm.utilisation:.0%} of the datasheet"
    return f"about {run.seconds / HOUR:,.1f} h {by}; {limit}"


if __name__ == "__main__":
    main()
