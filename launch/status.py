"""The runs of a folder, or of a user's SLURM jobs, in a table: how far they are, how fast, and what last stopped them.

python -m launch.status runs             the folder itself, or the runs up to three folders below it
python -m launch.status --user           of one's own jobs in the queue, submitted with launch.submit
python -m launch.status --user=anna --wide     a line for every figure, for narrow terminals and for scripts
"""

import contextlib
import getpass
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from launch.requeue import in_words, records
from megatron_tn.cli import of_words
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ConfigError, load, shown
from megatron_tn.training.run_folder import RunFolder, starts_in
from megatron_tn.training.submission import Submission
from megatron_tn.training.watchdog.signs import died

DEPTH = 3  # folders below the one that is named
SILENT_S = 600.0  # a running run without a record for so long, and for twenty steps, is said to be silent
EVENTS = ("start/began", "stop/error")  # keys of the journal's records of starts and failures
TITLES = ("run", "state", "step", "loss", "tokens/s", "utilisation", "time left", "restarts", "last failure")


@dataclass(frozen=True)
class Job:
    """A line of squeue. number: SLURM_JOB_ID. array: the job array's number, or `number`. task: of the array, or "N/A".
    script: its path."""

    number: str
    array: str
    task: str
    state: str
    script: str

    @property
    def name(self) -> str:
        """As scancel takes it: the SLURM_JOB_ID of one task is the array's number."""
        return f"{self.array}_{self.task}" if self.task.isdecimal() else self.number


@of_words
def main(words: list[str]) -> None:
    users = [word for word in words if word == "--user" or word.startswith("--user=")]
    folders = [Path(word) for word in words if not word.startswith("-")]
    if unknown := [word for word in words if word.startswith("-") and word != "--wide" and word not in users]:
        raise ConfigError(f"unknown option {unknown[0]}; there are --user, --user=NAME and --wide")
    if not users and not folders:
        raise ConfigError("no folder of runs is named, and no --user")
    jobs = queue()
    if users:
        user = users[-1].partition("=")[2] or getpass.getuser()
        folders += folders_of_jobs(queue(user))
    runs = list(dict.fromkeys(run for folder in folders for run in runs_below(folder)))
    if not runs:
        raise ConfigError(f"no run in {', '.join(map(str, folders)) or 'the jobs of SLURM'}")
    show([_row_or_why_not(RunFolder(run), jobs) for run in runs], wide="--wide" in words)


def runs_below(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The folder itself where it is a run's, else those below it, in the order of their names. Folders that this user
    may not read are left out."""
    run = RunFolder(folder)
    with contextlib.suppress(PermissionError):
        if run.is_there or run.config_file.is_file() or any(run.submitted.glob("*/config.json")):
            yield folder
        elif depth and folder.is_dir():
            for below in sorted(path for path in folder.iterdir() if path.is_dir() and path != run.submitted):
                yield from runs_below(below, depth - 1)


def queue(user: str = "") -> list[Job]:
    """SLURM's queue; empty where there is no SLURM, or it does not answer."""
    if shutil.which("squeue") is None:
        return []
    words = ["squeue", "--noheader", "--array", "--sort=i", "--format=%A|%F|%K|%T|%o"]
    words += [f"--user={user}"] if user else []
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.split("|", 4) for line in done.stdout.splitlines()]
    return [Job(*map(str.strip, line)) for line in lines if len(line) == 5]


def folders_of_jobs(jobs: Sequence[Job]) -> list[Path]:
    """Folders of the runs, or sweeps, whose scripts launch.submit wrote."""
    scripts = [Submission(Path(job.script).parent) for job in jobs if job.script.endswith(f"/{Submission.SCRIPT}")]
    return list(dict.fromkeys(submission.run_dir for submission in scripts))


def jobs_of(run: RunFolder, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a run: of its last start, of its submissions, and of its tasks in a sweep's job arrays."""
    names = {number for one in Submission.all_of(run) for number in one.read().get("jobs", [])}
    for sweep in Submission.all_of(RunFolder(run.path.absolute().parent)):
        record = sweep.read()
        tasks = [Path(path).name for path in record.get("runs", [])]
        if run.path.absolute().name in tasks:
            task = tasks.index(run.path.absolute().name)
            names |= {f"{number}_{task}" for number in record.get("jobs", [])}
    return [job for job in jobs if job.number == run.job() or job.name in names]


def _row_or_why_not(run: RunFolder, jobs: Sequence[Job]) -> dict[str, str]:
    """`row_of`; of a run with a damaged file, which must not hide the others, what is wrong."""
    try:
        return row_of(run, jobs)
    except Exception as error:
        why = f"a file of it cannot be read: {type(error).__name__}: {error}"
        return dict.fromkeys(TITLES, "") | {"run": shown(str(run)), "state": shown(why)}


def row_of(run: RunFolder, jobs: Sequence[Job], now: float | None = None) -> dict[str, str]:
    """TITLES -> what is known of a run."""
    now = time.time() if now is None else now
    status, tail = run.status(), run.journal.tail()
    steps = [record for record in tail if "step_seconds" in record]
    last = steps[-1] if steps else {}
    seconds = statistics.median(record["step_seconds"] for record in steps) if steps else 0.0
    step, end = status.get("step", 0), last_step(run)
    if status.get("state") == "running" and last:
        step = max(step, last["step"])
    rates = [record["tokens_per_second"] for record in steps if "tokens_per_second" in record]
    requeues = records(run.path)
    events = [*run.records(*EVENTS), *run.superseded(*EVENTS)]
    found = {
        "run": str(run),
        "state": state_of(run, status, tail, jobs_of(run, jobs), max(SILENT_S, 20 * seconds), now),
        "step": f"{step:,} of {end:,}" if end else f"{step:,}",
        "loss": "" if last.get("loss") is None else f"{last['loss']:.4f}",
        "tokens/s": f"{statistics.median(rates):,.0f}" if rates else "",
        "utilisation": f"{last['utilisation']:.1%}" if "utilisation" in last else "",
        "time left": duration((end - step) * seconds) if seconds and end > step else "",
        # The journal has starts by hand too, and no start that ended before its first step.
        "restarts": str(max(len(starts_in(events)) - 1, sum("gave-up" not in record for record in requeues))),
        "last failure": failure_of(status, requeues, events),
    }
    return {title: shown(text) for title, text in found.items()}


def last_step(run: RunFolder) -> int:
    """The run's last step, by the settings of the last start, or of the newest submission before the first start; 0
    where neither can be read."""
    files = [run.config_file, *sorted(run.submitted.glob("*/config.json"), reverse=True)]
    for file in files:
        try:
            return load(file).last_step
        except ConfigError:
            continue
    return 0


def state_of(
    run: RunFolder, status: dict[str, Any], tail: list[dict[str, Any]], jobs: Sequence[Job], silent: float, now: float
) -> str:
    """The run's state: that of status.json, with what SLURM says of its jobs, and whether a run that should be running
    was killed, or has fallen silent."""
    state = status.get("state", "not started")
    times = [record["time"] for record in (status, *tail) if isinstance(record.get("time"), int | float)]
    if state == "running" and any(job.number == run.job() and job.state == "PENDING" for job in jobs):
        state = "requeued"
    elif state == "running" and died(run):
        state = "died without a word"
    elif state == "running" and times and now - max(times) > silent:
        state = f"running, silent for {duration(now - max(times))}"
    return ", ".join([state, *(f"job {job.name} {job.state.lower()}" for job in jobs)])


def failure_of(status: dict[str, Any], requeues: Sequence[dict[str, str]], events: Sequence[dict[str, Any]]) -> str:
    """The last failure's cause and step, by status.json, requeues.log or the journal's `events`, which has starts by
    hand too."""
    if status.get("state") == "failed" and status.get("error"):
        return f"step {status.get('step', 0):,}: {status['error']}"
    requeued = [record for record in requeues if record.get("code", "0") != "0"][-1:]
    stopped = [record for record in events if "stop/error" in record]
    last = max(stopped, key=lambda record: record["time"], default={"time": 0.0})
    if stopped and not (requeued and _time_of(requeued[0]) > last["time"]):
        return f"step {last['step']:,}: {last['stop/error']}"
    if requeued:
        return f"step {requeued[0].get('step')}: {requeued[0].get('cause') or in_words(int(requeued[0]['code']))}"
    return ""


def _time_of(requeue: dict[str, str]) -> float:
    """Unix time of a line of requeues.log; 0 where it has none."""
    try:
        return datetime.strptime(requeue["at"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def show(rows: Sequence[dict[str, str]], *, wide: bool) -> None:
    if wide:
        for row in rows:
            print("\n".join(f"{title}: {row[title]}" for title in TITLES if row[title]), end="\n\n")
        return
    run, *others = TITLES
    table = Table(Column(run, no_wrap=True, overflow="fold"), *others)  # a run is known by its whole name
    for row in rows:
        table.add_row(*(row[title] for title in TITLES))
    table_console().print(table)


if __name__ == "__main__":
    main()
