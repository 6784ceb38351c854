"""From sources to shards: `python -m data_pipeline.run pipeline=demo output=runs/demo/data`.

Arguments are Hydra overrides of conf/pipeline.yaml. A run that was killed goes on where it was; a complete one is left
as it is. Exit code 2 and a line a problem for bad input, before anything is written; 1 when a stage fails.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter

from data_pipeline.config import FREE, Settings, compose, difference
from data_pipeline.errors import InputError

# Raised when the same settings and sources give other bytes than before, so that no run is finished by two versions.
PIPELINE_VERSION = 2
RECORD = "pipeline.json"


class StageError(RuntimeError):
    """A stage failed for a reason that is not the input's; running again continues with it."""


def run(settings: Settings) -> dict:
    """Runs every stage that is not complete and returns the report. Raises InputError for what the user can mend
    and StageError for the rest."""
    output = Path(settings.output)
    record = check(settings)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
    with _exclusive(output):
        _prepare(output, record, settings.overwrite)
        from data_pipeline.progress import show
        from data_pipeline.report import write_report
        from data_pipeline.stages import build_stages
        from data_pipeline.tokenise import splits

        work = output / "work"
        try:
            stages = build_stages(settings, output, work)
        except OSError as error:
            raise StageError(f"output={output}: {error}") from error
        with (work / "pipeline.log").open("a", buffering=1) as log, show(stages) as display:
            for stage in stages:
                try:
                    with display.stage(stage), _quiet(log):
                        stage.executor(settings.workers).run()
                except InputError:
                    raise
                except Exception as error:
                    raise StageError(f"stage {stage.name}: {type(error).__name__}: {error}; see {log.name}") from error
        return write_report(output, work, splits(settings.heldout_fraction))


def check(settings: Settings) -> dict:
    """Checks the settings against the machine and returns what identifies the run: the settings that decide its bytes,
    and its input. Raises InputError with all problems."""
    from data_pipeline import tokenizer
    from data_pipeline.readers import list_inputs
    from data_pipeline.tokenise import describe

    problems, inputs, tokenizer_hash = [], [], None
    for name, source in settings.sources.items():
        try:
            inputs += list_inputs({name: source})
        except InputError as error:
            problems += error.problems
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
    if problems:
        raise InputError(*problems)
    decisive = TypeAdapter(Settings).dump_python(settings, mode="json", exclude=set(FREE))
    digest = hashlib.sha256(json.dumps(sorted(inputs)).encode()).hexdigest()
    read = {"files": len(inputs), "sha256": digest, "tokenizer_sha256": tokenizer_hash}
    return {"version": PIPELINE_VERSION, "inputs": read, "settings": decisive}


def _prepare(output: Path, record: dict, overwrite: bool) -> None:
    """Makes `output` ready for the run `record`: new, or continuing that very run."""
    path = output / RECORD
    held = sorted(entry.name for entry in output.iterdir() if entry.name != ".lock")
    if path.is_file():
        if not (changed := difference(json.loads(path.read_bytes()), record)):
            return
        if not overwrite:
            raise InputError(
                *(f"output={output} was made otherwise: {line}" for line in changed),
                f"output={output}: choose another, or overwrite=true to lose what it holds",
            )
        for name in held:
            entry = output / name
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    elif held:
        raise InputError(f"output={output} holds {held[0]!r} and no {RECORD}: it is no run of this pipeline")
    (output / "work").mkdir()
    path.write_text(json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Holds `output` for this process, by a lock that children do not inherit: datatrove's helper process may outlive a
    killed run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
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
    """Sends what datatrove and its workers say to the log. They inherit the replaced stream, and the terminal is left
    to the progress bars."""
    from loguru import logger

    with contextlib.redirect_stderr(log):
        logger.remove()
        logger.add(log, colorize=False)
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="pipeline=demo output=FOLDER tasks=8 ...")
    began = time.perf_counter()
    try:
        settings = compose(parser.parse_args(arguments).overrides)
        report = run(settings)
    except InputError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return 2
    except StageError as error:
        print(error, file=sys.stderr)
        return 1
    for split, figures in report["splits"].items():
        print(f"{settings.output}/{split}: " + ", ".join(f"{value} {key}" for key, value in figures.items()))
    print(f"{time.perf_counter() - began:.1f} s; every stage and every drop by rule: {settings.output}/report.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
