"""datatrove's executors, adapted: local processes, and SLURM job arrays.

Both use the same completion markers, so one can finish a run that the other began.
"""

import copy
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from datatrove.executor.base import ExecutorJSONEncoder
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import _better_exceptions

from data_pipeline.config import Slurm
from data_pipeline.errors import InputError, StageError
from data_pipeline.files import read_object, replace_file
from data_pipeline.redaction import redacted, storable

ROOT = Path(__file__).resolve().parents[1]
ORPHAN_SECONDS = 0.5  # interval at which a worker checks that its parent lives
POLL_SECONDS = 2.0  # interval of squeue calls
PATIENCE = 15  # polls between a job's end and its completion markers on a shared file system
SHOWN_TASKS = 5


def _adapt_tracebacks() -> None:
    """Has loguru look for the folders of libraries once: it asks sysconfig for 36 paths, in 10 ms, for every handler,
    and datatrove adds three handlers a task. And its tracebacks, which show values of variables, hold no secrets."""
    formatter = _better_exceptions.ExceptionFormatter
    find, lines = formatter._get_lib_dirs, formatter.format_exception
    formatter._get_lib_dirs = staticmethod(functools.cache(find))
    formatter.format_exception = lambda *args, **more: map(redacted, lines(*args, **more))


_adapt_tracebacks()


class TaskError(StageError):
    """A task raised an error; `rank` says which task."""

    def __init__(self, rank: int, error: Exception):
        super().__init__(f"{type(error).__name__}: {error}")
        self.rank = rank
        self.error = error


class _Described:
    """An executor whose description in executor.json holds no secrets."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        text = json.dumps(self, cls=ExecutorJSONEncoder)
        with self.logging_dir.open("executor.json", "w") as file:
            json.dump(storable(json.loads(text)), file, indent=indent)


class LocalExecutor(_Described, LocalPipelineExecutor):
    """datatrove's local executor, with a pool that detects a killed worker (datatrove's waits forever for its task),
    and whose workers exit when the run is killed."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        self.save_executor_as_json()
        if self.workers == 1:
            for rank in ranks:
                try:
                    _run_task(self, rank)
                except Exception as error:
                    raise TaskError(rank, error) from error
            return
        # Forked workers inherit the executor, so it need not be picklable.
        context, started = get_context("fork"), (os.getpid(), self)
        with ProcessPoolExecutor(min(self.workers, len(ranks)), context, _start_worker, started) as pool:
            futures = {pool.submit(_run_in_worker, rank): rank for rank in ranks}
            try:
                for future in as_completed(futures):
                    future.result()
            except BrokenProcessPool:
                running = [rank for rank in self.get_incomplete_ranks() if self.task_log(rank).exists()]
                raise StageError(
                    f"a worker was killed (is the memory enough for workers={self.workers}?); "
                    f"{name_tasks(running)} {'was' if len(running) == 1 else 'were'} under way"
                ) from None
            except BaseException as error:
                pool.shutdown(cancel_futures=True)  # running tasks finish, no new ones start
                raise (TaskError(futures[future], error) if isinstance(error, Exception) else error) from None

    def task_log(self, rank: int) -> Path:
        return Path(self.logging_dir.path) / "logs" / f"task_{rank:05d}.log"


_worker_executor: LocalExecutor | None = None


def _start_worker(parent: int, executor: LocalExecutor) -> None:
    global _worker_executor
    _worker_executor = executor

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_in_worker(rank: int) -> None:
    _run_task(_worker_executor, rank)


def _run_task(executor: LocalExecutor, rank: int) -> None:
    task = copy.copy(executor)
    task.pipeline = copy.deepcopy(executor.pipeline)  # steps keep counts and open files
    task._run_for_rank(rank, local_rank=rank)


class SlurmExecutor(_Described, SlurmPipelineExecutor):
    """datatrove's SLURM executor, with every word of its job script quoted for the shell and for sbatch, and without
    its extra job per stage for statistics, which the report already has."""

    def launch_merge_stats(self) -> None:
        pass

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        options = super().get_sbatch_args(max_array)
        log = Path(self.slurm_logs_folder.replace("%", "%%")) / "%A_%a.out"  # SLURM replaces %A in its options
        return options | {"output": log, "error": log}

    def get_launch_file_contents(self, sbatch_args: dict, run_script: str) -> str:
        """The job script; `run_script`, datatrove's unquoted command, is not used."""
        options = [f"--{key}={value}" if value else f"--{key}" for key, value in sbatch_args.items()]
        srun = ["srun", *(f"--{key}={value}" for key, value in (self.srun_args or {}).items()), "-l", "-n", "1"]
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH {shlex.quote(option)}" for option in options),
            self.env_command,
            "set -xe",
            "export PYTHONUNBUFFERED=TRUE",
            shlex.join([*srun, "launch_pickled_pipeline", self.logging_dir.resolve_paths("executor.pik")]),
        ]
        return "\n".join(lines) + "\n"


def slurm_executor(settings: Slurm, name: str, steps: list, tasks: int, folder: Path, depends) -> SlurmExecutor:
    """The job array of a stage, which starts after `depends`, the previous stage's executor, has succeeded."""
    # The job uses this process's interpreter and sources, whatever the node's environment.
    bin, root = shlex.quote(str(Path(sys.executable).parent)), shlex.quote(str(ROOT))
    path = f"export PATH={bin}:$PATH PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}"
    return SlurmExecutor(
        steps,
        tasks=tasks,
        time=str(settings.time),
        partition=settings.partition,
        cpus_per_task=settings.cpus_per_task,
        mem_per_cpu_gb=settings.mem_per_cpu_gb,
        workers=settings.at_once or -1,
        tasks_per_job=settings.tasks_per_job,
        max_array_size=settings.max_array_size,
        job_name=f"{settings.job_name}_{name}",
        qos=settings.qos,
        env_command="\n".join(part for part in (settings.env_command, path) if part),
        # When the previous stage fails, SLURM removes this job instead of leaving it pending forever.
        sbatch_args={"kill-on-invalid-dep": "yes", **settings.sbatch_args},
        srun_args=dict(settings.srun_args) or None,
        depends=depends,
        logging_dir=str(folder.absolute()),
    )


class Queue:
    """The jobs of a run, {stage: job id} in work/slurm.json, and their SLURM states."""

    def __init__(self, work: Path):
        self.path = work / "slurm.json"

    def jobs(self) -> dict[str, str]:
        return read_object(self.path) if self.path.is_file() else {}

    def record(self, jobs: dict[str, str]) -> None:
        replace_file(self.path, json.dumps(jobs, indent=1).encode() + b"\n")

    def live(self, jobs: list[str]) -> list[str]:
        """The pending and running `jobs`; all `jobs` when SLURM does not answer."""
        if not jobs or shutil.which("squeue") is None:
            return []
        found = []
        for job in jobs:
            asked = subprocess.run(
                ["squeue", "--noheader", "--format=%A", "--job", job], capture_output=True, text=True
            )
            if asked.stdout.strip() or (asked.returncode and "Invalid job id" not in asked.stderr):
                found.append(job)
        return found

    def cancel(self, jobs: list[str]) -> None:
        if jobs:
            subprocess.run(["scancel", *jobs], capture_output=True)


def run_on_slurm(settings: Slurm, stages: list, queue: Queue, follow: Callable, tell: Callable[[str], None]) -> bool:
    """Submits the incomplete stages as job arrays, each depending on the previous one, and follows them.
    `follow(stage)`: context manager that shows progress; `tell(line)` prints. Returns whether all stages are complete:
    False without `wait`. Raises StageError naming stage, task and log when a job fails."""
    if live := queue.live(list(queue.jobs().values())):
        tell(f"following the jobs of an earlier start that are still in the queue: {' '.join(live)}")
        if not settings.wait:
            return False
        _follow(stages, queue, follow)
    if any(stage.completed() < stage.tasks for stage in stages):
        _submit(settings, stages, queue)
        tell(f"submitted jobs {' '.join(queue.jobs().values())}")
        if not settings.wait:
            return False
    _follow(stages, queue, follow)
    return True


def _submit(settings: Slurm, stages: list, queue: Queue) -> None:
    executors, previous = {}, None
    for stage in stages:
        executors[stage.name] = previous = slurm_executor(
            settings, stage.name, stage.all_steps(), stage.tasks, stage.folder, previous
        )
    error = None
    try:
        previous.run()  # first submits the stages that it depends on
    except subprocess.CalledProcessError as failed:
        error = failed
    # datatrove's job id is -1 for a complete stage.
    jobs = {name: executor.job_id for name, executor in executors.items() if executor.job_id not in (None, -1)}
    if error:
        queue.cancel(list(jobs.values()))
        raise InputError(
            f"executor=slurm: sbatch refused a stage with exit code {error.returncode}: its message is above"
        )
    queue.record(jobs)


def _follow(stages: list, queue: Queue, follow: Callable) -> None:
    jobs = queue.jobs()
    for stage in stages:
        with follow(stage):
            patience = PATIENCE
            while stage.completed() < stage.tasks:
                if stage.name not in jobs or not queue.live([jobs[stage.name]]):
                    patience -= 1
                if not patience or (patience < PATIENCE and stage.failed_tasks()):
                    queue.cancel(list(jobs.values()))  # later stages, if still in the queue
                    raise StageError(stage.failure(jobs.get(stage.name)))
                time.sleep(POLL_SECONDS)


def name_tasks(ranks: list[int]) -> str:
    """`task 3`, or `tasks 1, 2, 3 and 4 more`."""
    shown = ", ".join(map(str, ranks[:SHOWN_TASKS]))
    more = f" and {len(ranks) - SHOWN_TASKS} more" if len(ranks) > SHOWN_TASKS else ""
    return f"task{'s' * (len(ranks) != 1)} {shown or 'none'}{more}"


def last_error(log: Path) -> str | None:
    """The last line of the last traceback in a task's log; None without a traceback."""
    if not log.is_file():
        return None
    found = None
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("Traceback"):
            found = ""
        elif found is not None and re.match(r"[A-Za-z_][\w.]*(?:: |$)", line):
            found = line
    return found or None
