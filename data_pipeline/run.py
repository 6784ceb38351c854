"""From sources to shards: `python -m data_pipeline.run pipeline=demo output=runs/demo/data`.

Arguments are Hydra overrides of conf/pipeline.yaml. A killed run continues where it stopped; a complete one is not
changed. Exit code 2 with a line per problem for bad input, before anything is written; 1 when a stage fails, naming
stage, task and log; 130 when interrupted.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter

from data_pipeline.cli import command, overrides
from data_pipeline.config import FREE, Settings, compose, difference
from data_pipeline.errors import InputError, StageError
from data_pipeline.files import TEMPORARY, explain, open_lock, read_object, replace_file
from data_pipeline.redaction import has_credentials, redacted, storable, written

# Raised with every change of the output for the same settings and sources, so that two versions never share a run.
PIPELINE_VERSION = 6
RECORD = "pipeline.json"


def run(settings: Settings) -> dict | None:
    """Runs every incomplete stage and returns the report, or None with `executor=slurm` and `slurm.wait` off. Raises
    InputError for errors that the user can fix and StageError for others."""
    output = Path(settings.output)
    record = check(settings)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    with _exclusive(output):
        _prepare(output, record, settings.overwrite)
        from data_pipeline.progress import show
        from data_pipeline.stages import build_stages

        # Absolute: a SLURM job may start in another folder.
        work = output.absolute() / "work"
        try:
            stages = build_stages(settings, output.absolute(), work, record["inputs"]["sha256"])
            log = (work / "pipeline.log").open("a", buffering=1)
        except OSError as error:
            raise StageError(f"output={output}: {explain(error, output)}") from error
        try:
            with show(stages) as display:
                if settings.executor == "slurm":
                    complete = _run_on_slurm(settings, stages, work, log, display)
                else:
                    _run_here(settings, stages, work, log, display)
                    complete = True
        finally:
            with contextlib.suppress(OSError):  # the disk is full, as the stage says with its name
                log.close()
    if not complete:
        return None
    report = json.loads((output / "report.json").read_bytes())
    found, asked = report["tokenizer"]["vocab_size"], settings.tokenizer.vocab_size
    if report["tokenizer"]["trained"] and found < asked:
        because = "its sample of text has no more pairs to merge"
        print(f"note: the tokenizer has {found} entries, not tokenizer.vocab_size={asked}: {because}", file=sys.stderr)
    return report


def _run_here(settings: Settings, stages: list, work: Path, log, display) -> None:
    from data_pipeline.executors import Queue, TaskError

    queue = Queue(work)
    if live := queue.live(list(queue.jobs().values())):
        raise InputError(
            f"output={settings.output}: SLURM jobs {' '.join(live)} of an earlier start are still in the queue: follow "
            "them with executor=slurm, or scancel them"
        )
    for stage in stages:
        try:
            with display.stage(stage), _quiet(log):
                stage.local_executor(settings.workers).run()
        except InputError:
            raise
        except TaskError as error:
            if isinstance(error.error, InputError):
                raise error.error from None
            where = f"stage {stage.name}, task {error.rank}"
            raise StageError(f"{where}: {explain(error.error, work)}; log: {stage.task_log(error.rank)}") from error
        except Exception as error:
            line = str(error) if isinstance(error, StageError) else explain(error, work)
            raise StageError(f"stage {stage.name}: {line}; log: {log.name}") from error


def _run_on_slurm(settings: Settings, stages: list, work: Path, log, display) -> bool:
    from data_pipeline.executors import Queue, run_on_slurm

    queue = Queue(work)
    try:
        with _quiet(log):
            return run_on_slurm(settings.slurm, stages, queue, display.stage, display.tell)
    except KeyboardInterrupt:
        jobs = " ".join(queue.live(list(queue.jobs().values())))
        display.tell(f"jobs {jobs} go on: run the same command to follow them, or scancel {jobs}")
        raise


def check(settings: Settings) -> dict:
    """Checks the settings against files and installed packages; returns the run's identity: the settings that determine
    its output, and its inputs. Raises InputError with all problems."""
    from data_pipeline import tokenizer
    from data_pipeline.readers import input_sizes, inputs_hash, list_source
    from data_pipeline.readers.preflight import key_problem, output_problem
    from data_pipeline.round_trip import round_trip_problem
    from data_pipeline.sample import weight_problems
    from data_pipeline.tokenise import describe

    problems, inputs, files, tokenizer_hash = [], [], {}, None
    for name, source in settings.sources.items():
        try:
            listing = list_source(name, source)
        except InputError as error:
            problems += error.problems
            continue
        files[name] = listing.files
        inputs += input_sizes(listing.files)
        found = (output_problem(name, source, Path(settings.output)), key_problem(name, source, listing.files))
        problems += filter(None, found)
        for note in listing.notes:
            print(f"note: {redacted(note)}", file=sys.stderr)
    if not settings.sources:
        problems.append("sources: empty; there is nothing to read")
    if settings.tokenizer.file:
        try:
            tokenizer_hash = describe(settings.tokenizer.file, settings.tokenizer).sha256
        except InputError as error:
            problems += error.problems
    elif settings.tokenizer.vocab_size < tokenizer.SMALLEST:
        problems.append(f"tokenizer.vocab_size={settings.tokenizer.vocab_size} must be at least {tokenizer.SMALLEST}")
    output = Path(settings.output)
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problems.append(f"output={output}: {existing} is not a folder that may be written to")
    problems += weight_problems(settings.tokenizer, settings.sources)
    problems += _slurm_problems(settings) if settings.executor == "slurm" else []
    if tokenizer_hash and not problems:
        problems += filter(None, [round_trip_problem(settings, files)])
    if problems:
        raise InputError(*problems)
    decisive = TypeAdapter(Settings).dump_python(settings, mode="json", exclude=set(FREE))
    read = {"files": len(inputs), "sha256": inputs_hash(inputs), "tokenizer_sha256": tokenizer_hash}
    return {"version": PIPELINE_VERSION, "inputs": read, "settings": storable(decisive)}


def _slurm_problems(settings: Settings) -> list[str]:
    problems = []
    if settings.slurm.partition is None:
        problems.append("slurm.partition: missing; executor=slurm needs slurm.partition=NAME (sinfo lists them)")
    if missing := [command for command in ("sbatch", "squeue", "scancel") if shutil.which(command) is None]:
        problems.append(f"executor=slurm: no {' '.join(missing)} on this machine: it is no SLURM login node")
    slurm = settings.slurm
    words = {f"slurm.{name}": getattr(slurm, name) for name in ("partition", "time", "qos", "job_name")}
    for group in ("sbatch_args", "srun_args"):
        words |= {f"slurm.{group}.{key}": f"{key}={value}" for key, value in getattr(slurm, group).items()}
    for name, word in (words | {"output": settings.output}).items():
        if not str(word).isprintable() or "\\" in str(word):
            problems.append(f"{name}={word!r}: a backslash or a control character in it cannot stand in a job script")
    if written(slurm.env_command) != slurm.env_command:
        problems.append(
            "slurm.env_command: write $NAME for ${oc.env:NAME}, which the job script would have the value of"
        )
    problems += [
        f"sources.{name}.path={source.path}: with executor=slurm its credentials would lie in files: give them as "
        "${oc.env:NAME}, which the tasks resolve"
        for name, source in settings.sources.items()
        if has_credentials(source.path)
    ]
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        problems.append(
            "executor=slurm: this is a task of a job array, which cannot submit the stages: use a login node"
        )
    return problems


def _prepare(output: Path, record: dict, overwrite: bool) -> None:
    """Prepares `output` for the run identified by `record`: a new run, or a continuation of the same run."""
    path, stages = output / RECORD, output / "work" / "stages"
    names = [entry.name for entry in output.iterdir() if not entry.name.endswith(TEMPORARY)]
    held = sorted(name for name in names if name not in (".lock", RECORD))
    old = storable(read_object(path)) if path.is_file() else {}
    changed = difference(old, record)
    if held and not old:
        raise InputError(
            f"output={output} holds {held[0]!r} and no {RECORD}: it is no run of this pipeline; choose another folder"
        )
    if old and changed:
        if not overwrite:
            raise InputError(
                *(f"output={output} was made with other settings: {line}" for line in changed),
                f"output={output}: choose another, or overwrite=true to delete its content",
            )
        # Deletes completion markers first and keeps the record: if interrupted, this can be repeated, and a run with
        # the old settings does not take partly deleted stages for complete.
        for entry in (stages, *(output / name for name in held)):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
    if changed:
        replace_file(path, json.dumps(record, indent=1).encode() + b"\n")
    (output / "work").mkdir(exist_ok=True)


@contextlib.contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Locks `output` for this process. Child processes do not inherit the lock: datatrove's helper process may outlive
    a killed run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open_lock(output / ".lock")
    except OSError as error:
        raise InputError(f"output={output}: {error.strerror}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"output={output} is being written by another run") from None
        yield


@contextlib.contextmanager
def _quiet(log) -> Iterator[None]:
    """Redirects standard error of datatrove and its workers to the log, so that the terminal shows only progress
    bars."""
    from loguru import logger

    with contextlib.redirect_stderr(log):
        logger.remove()
        logger.add(log, colorize=False)
        yield


@command
def main(arguments: list[str]) -> None:
    began = time.perf_counter()
    settings = compose(overrides("data_pipeline.run", __doc__, arguments, Settings))
    report = run(settings)
    if report is None:
        print(f"jobs submitted; the same command follows them until {settings.output}/report.json is written")
        return
    from data_pipeline.report import stages_in_words

    print(stages_in_words(report))
    for split, figures in report["splits"].items():
        print(f"{settings.output}/{split}: " + ", ".join(f"{value} {key}" for key, value in figures.items()))
    print(f"{time.perf_counter() - began:.1f} s; every stage and every drop by rule: {settings.output}/report.html")


if __name__ == "__main__":
    sys.exit(main())
