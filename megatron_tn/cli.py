"""From a command line to a checked config: Hydra composes `conf/`, dataclasses come out, bad input exits with 2."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from megatron_tn.config import ConfigError, from_mapping, to_mapping
from megatron_tn.overrides import CONF, CommandLine, job_folder, settings

log = logging.getLogger(__name__)

BAD_INPUT = 2  # exit code
CLOSED_PIPE = 128 + signal.SIGPIPE  # exit code of a program whose reader went away, as of `... | head -1`


def command(
    kind: type, config_name: str, literal: tuple[str, ...] = ()
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorator: `function(config: kind)` becomes a command line over conf/`config_name`.yaml.

    literal: settings whose value is free text, taken to the letter; Hydra's own syntax would trim and parse it.

    The dataclass's defaults enter Hydra as the schema `config_name`_schema, so that every key it does not have is
    refused, with the nearest known one. In a multirun every job's run_dir is a folder of its own below run_dir; a job
    whose function returns True, because it was told to stop, is the last one.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[[], None]:
        ConfigStore.instance().store(f"{config_name}_schema", to_mapping(kind()))

        texts: dict[str, str] = {}
        line: CommandLine

        def run(composed: DictConfig) -> None:
            with bad_input_exits(), closed_pipe_exits():
                job = HydraConfig.get()
                multirun = job.mode == hydra.types.RunMode.MULTIRUN
                if multirun and (words := line.choices_win(job.overrides.task)) != job.overrides.task:
                    composed = line.compose(words)  # with a choice that the sweep varies
                values = settings(composed) | texts
                if multirun:
                    values["run_dir"] = job_folder(values["run_dir"], job, line.overrides)
                if function(from_mapping(kind, values)) and multirun:
                    log.info("told to stop: the sweep ends here, and the same command goes on with it")
                    sys.exit(0)

        def main() -> None:
            nonlocal line
            logging.basicConfig(level=logging.INFO if is_first_process() else logging.WARNING, format="%(message)s")
            pairs = [word.partition("=") for word in sys.argv[1:]]
            texts.update({key: value for key, equals, value in pairs if equals and key in literal})
            # The deepspeed launcher adds --local_rank, which says nothing that LOCAL_RANK does not.
            aside = {*literal, "--local_rank"}
            words = ["".join(pair) for pair in pairs if pair[0] not in aside]
            with bad_input_exits():
                line = CommandLine.parse(kind, config_name, words)
                line.check()
            sys.argv[1:] = line.words()
            hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)(run)()

        return main

    return decorate


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a command line that trains, and end this process with its exit code.

    Python's own end would abort a process, now and then, whose work is done: a thread that needs the interpreter while
    it is torn down is ended inside C++, which C++ answers with SIGABRT. gloo's threads need it to let go of a tensor, a
    moment after its collective was waited for. So all that Python does at its end is done here, but for that tearing
    down; `multiprocessing` ends its processes in the same way.
    """
    code: Any = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        sys.excepthook(type(error), error, error.__traceback__)
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    if not code:  # the work is done: being told to stop now must not make it look like a death by signal
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    try:
        threading._shutdown()  # waits for threads that are no daemons
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when a reader dies
        for child in multiprocessing.active_children():
            if child.daemon:  # a reader that was left behind, since its storage does not answer: it would be waited for
                child.kill()
        atexit._run_exitfuncs()
        gc.collect()  # closes files that nobody closed
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # its reader has gone, or there never was one
                stream.flush()
    finally:
        os._exit(code or 0)


def is_first_process() -> bool:
    """Whether the launcher called this process rank 0; known before any process group is."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


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
            time.sleep(2)  # a launcher stops every rank as soon as one ends; the first must get its lines out
        sys.exit(BAD_INPUT)


@contextlib.contextmanager
def closed_pipe_exits() -> Iterator[None]:
    """Leave quietly, as other programs do, when whoever read our output has gone."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would fail again at the end
        sys.exit(CLOSED_PIPE)
