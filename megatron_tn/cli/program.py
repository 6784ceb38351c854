"""From a command line to a checked config: Hydra composes `conf/`, dataclasses come out, bad input exits with 2."""

import atexit
import contextlib
import gc
import importlib
import inspect
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from megatron_tn.cli.override_check import check_overrides
from megatron_tn.cli.overrides import CONF, CommandLine, settings
from megatron_tn.cli.submitit import failure_is_told, settings_for_submitit
from megatron_tn.cli.sweep_folder import job_folder, listed_by_swept_settings
from megatron_tn.config import ConfigError, from_mapping, redacted, shown, to_mapping
from megatron_tn.config.describe import help_text

log = logging.getLogger(__name__)

BAD_INPUT = 2  # exit code
CLOSED_PIPE = 128 + signal.SIGPIPE  # exit code of a program whose reader went away, as of `... | head -1`
INTERRUPTED = 128 + signal.SIGINT  # exit code of a program that Ctrl-C ended


def command(
    kind: type,
    config_name: str,
    literal: tuple[str, ...] = (),
    after_sweep: Callable[[str, list[str]], None] = lambda run_dir, runs: None,
) -> Callable[[Callable[[Any], int | None]], Callable[[], None]]:
    """Decorator: `function(config: kind)` becomes a command line over conf/`config_name`.yaml.

    function: returns None, or the exit code of a program that was told to stop. literal: settings whose value is free
    text, taken to the letter; Hydra's own syntax would trim and parse it. after_sweep(run_dir, folders of the jobs):
    called on rank 0 when a multirun is done.

    The dataclass's defaults enter Hydra as the schema `config_name`_schema, so that every key it does not have is
    refused, with the nearest known one. In a multirun every job's run_dir is a folder of its own below run_dir, and a
    job that was told to stop is the last one.
    """

    def decorate(function: Callable[[Any], int | None]) -> Callable[[], None]:
        ConfigStore.instance().store(f"{config_name}_schema", to_mapping(kind()))

        texts: dict[str, str] = {}
        jobs: list[tuple[str, str]] = []  # run_dir of the sweep and of each of its jobs
        line: CommandLine
        program = _Program(function)

        def run(composed: DictConfig) -> None:
            if not logging.getLogger().handlers:  # a process of submitit's
                _log_to_standard_error(logging.INFO if is_first_process() else logging.WARNING)
            with failure_is_told(), bad_input_exits(), closed_pipe_exits(), told_failure_exits():
                job = HydraConfig.get() if line.needs_hydra else None
                multirun = job is not None and job.mode == hydra.types.RunMode.MULTIRUN
                if multirun and (words := line.choices_win(job.overrides.task)) != job.overrides.task:
                    composed = line.compose(words)  # with a choice that the sweep varies
                try:
                    values = settings(composed) | texts
                except OmegaConfBaseException as error:
                    raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
                if multirun:
                    jobs.append((values["run_dir"], job_folder(values["run_dir"], job, line.overrides)))
                    values["run_dir"] = jobs[-1][1]
                if (code := program(from_mapping(kind, values))) is not None:
                    if multirun:
                        log.info("stop signal: the sweep ends with this job; the same command continues it")
                    sys.exit(code)

        def main() -> None:
            nonlocal line
            if {"-h", "--help"} & set(sys.argv[1:]):
                if is_first_process():
                    with closed_pipe_exits():
                        print(help_text(kind, function.__globals__["__doc__"] or ""))
                return
            _log_to_standard_error(logging.INFO if is_first_process() else logging.WARNING)
            pairs = [word.partition("=") for word in sys.argv[1:]]
            texts.clear()  # left by an earlier call in this process
            texts.update({key: value for key, equals, value in pairs if equals and key in literal})
            # The deepspeed launcher adds --local_rank; the environment variable LOCAL_RANK says the same.
            aside = {*literal, "--local_rank"}
            words = ["".join(pair) for pair in pairs if pair[0] not in aside]
            with bad_input_exits():
                words += settings_for_submitit(words)
                line = CommandLine.parse(kind, config_name, words)
                check_overrides(line)
            if not line.needs_hydra:  # Hydra would compose the config twice more: 0.15 s of each rank's start
                run(line.composed)
                return
            with listed_by_swept_settings(line.overrides), tempfile.TemporaryDirectory() as aside:
                sys.argv[1:] = line.words(aside)
                hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)(run)()
            if jobs and is_first_process():
                after_sweep(jobs[0][0], [folder for _, folder in jobs])

        main.__wrapped__ = function  # what `_Named` calls, where the module has `main` by the function's name
        return main

    return decorate


class _Program:
    """The function of a command line. submitit pickles it, and its job has no handler for signals, which end it then,
    until the pickle is loaded; so the pickle has the function's name, and the job imports its module, and with that
    torch, when it calls the function."""

    def __init__(self, function: Callable[[Any], int | None]):
        self.function = function

    def __call__(self, config: Any) -> int | None:
        return self.function(config)

    def __reduce__(self) -> tuple[Any, ...]:
        spec = self.function.__globals__["__spec__"]  # `__name__` of a module that runs as a program is __main__
        return (_Named, (spec.name, self.function.__name__)) if spec else (_Program, (self.function,))


@dataclass(frozen=True)
class _Named:
    module: str
    name: str

    def __call__(self, config: Any) -> int | None:
        return inspect.unwrap(getattr(importlib.import_module(self.module), self.name))(config)


def of_words(function: Callable[[list[str]], None]) -> Callable[[], None]:
    """Decorator: `function(words)` becomes a command line outside Hydra, of paths and few settings. With --help, or
    without words, which are bad input then, the docstring of its module is printed; bad input exits with 2."""

    def main() -> None:
        words = sys.argv[1:]
        if not words or {"-h", "--help"} & set(words):
            with closed_pipe_exits():
                print(function.__globals__["__doc__"])
            sys.exit(0 if words else BAD_INPUT)
        with bad_input_exits(), unusable_files_are_named(), closed_pipe_exits():
            function(words)

    return main


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a command line that joins other ranks, and end this process with its exit code.

    Everything that Python does at its end is done here, but for tearing down the interpreter, as `multiprocessing` ends
    its processes. That teardown would abort, now and then, a process whose work is done: gloo's threads take Python's
    lock to free a tensor, a moment after its collective was waited for; a thread that does so during the teardown is
    ended inside C++, which calls abort().
    """
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = INTERRUPTED
        print("interrupted before there was anything to save", file=sys.stderr)
    except BaseException as error:
        code = 1
        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    if not code:  # the work is done: being told to stop now must not make it look like a death by signal
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    try:
        threading._shutdown()  # waits for threads that are no daemons
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when a reader dies
        for child in multiprocessing.active_children():
            if child.daemon:  # a data reader whose storage does not answer; Python would wait for it at exit
                child.kill()
        atexit._run_exitfuncs()
        gc.collect()  # closes files that nobody closed
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # a closed pipe, or no stream at all
                stream.flush()
    finally:
        os._exit(code or 0)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _log_to_standard_error(level: int) -> None:
    """Messages alone, without secrets."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def is_first_process() -> bool:
    """Whether the launcher made this process rank 0. Known before the process group exists."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


@contextlib.contextmanager
def told_failure_exits() -> Iterator[None]:
    """Exit with code 1 on an error that the trainer has told in one line, with the file that has its traceback."""
    try:
        yield
    except Exception as error:
        if getattr(error, "is_told", False):
            sys.exit(1)
        raise


@contextlib.contextmanager
def bad_input_exits() -> Iterator[None]:
    """Print a ConfigError's problems, one line each and on one rank alone, and exit with code 2."""
    try:
        yield
    except ConfigError as error:
        if is_first_process():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # a launcher kills all ranks as soon as one ends; rank 0 must print its lines first
        sys.exit(BAD_INPUT)


@contextlib.contextmanager
def unusable_files_are_named() -> Iterator[None]:
    """Raise ConfigError for a file that cannot be read or written, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(f"{error.filename}: {error.strerror}") from None


@contextlib.contextmanager
def closed_pipe_exits() -> Iterator[None]:
    """Exit quietly, as other programs do, when the reader of standard output has gone (`... | head -1`)."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushing at exit would fail again
        sys.exit(CLOSED_PIPE)
