"""From a command line to a checked config: Hydra composes `conf/`, dataclasses come out, bad input exits with 2."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_tn.config import ConfigError, from_mapping, known_keys, to_mapping, unknown_key

log = logging.getLogger(__name__)

CONF = Path(__file__).resolve().parents[1] / "conf"
MULTIRUN = ("-m", "--multirun")
BAD_INPUT = 2  # exit code
CLOSED_PIPE = 128 + signal.SIGPIPE  # exit code of a program whose reader went away, as of `... | head -1`
INTERRUPTED = 128 + signal.SIGINT  # exit code of a program that Ctrl-C ended


def command(
    kind: type, config_name: str, literal: tuple[str, ...] = ()
) -> Callable[[Callable[[Any], int | None]], Callable[[], None]]:
    """Decorator: `function(config: kind)` becomes a command line over conf/`config_name`.yaml.

    function: returns None, or the exit code of a program that was told to stop. literal: settings whose value is free
    text, taken to the letter; Hydra's own syntax would trim and parse it.

    The dataclass's defaults enter Hydra as the schema `config_name`_schema, so that every key it does not have is
    refused, with the nearest known one. In a multirun every job's run_dir is a folder of its own below run_dir, and a
    job that was told to stop is the last one.
    """

    def decorate(function: Callable[[Any], int | None]) -> Callable[[], None]:
        ConfigStore.instance().store(f"{config_name}_schema", to_mapping(kind()))

        texts: dict[str, str] = {}

        def run(composed: DictConfig) -> None:
            with bad_input_exits(), closed_pipe_exits():
                values = OmegaConf.to_container(composed, resolve=True) | texts
                multirun = HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN
                if multirun:
                    values["run_dir"] = f"{values['run_dir']}/{job_name(HydraConfig.get(), sys.argv[1:])}"
                if (code := function(from_mapping(kind, values))) is not None:
                    if multirun:
                        log.info("told to stop: the sweep ends here, and the same command goes on with it")
                    sys.exit(code)

        def main() -> None:
            logging.basicConfig(level=logging.INFO if is_first_process() else logging.WARNING, format="%(message)s")
            pairs = [word.partition("=") for word in sys.argv[1:]]
            texts.update({key: value for key, equals, value in pairs if equals and key in literal})
            # The deepspeed launcher adds --local_rank; the environment variable LOCAL_RANK says the same.
            aside = {*literal, "--local_rank"}
            words = ["".join(pair) for pair in pairs if pair[0] not in aside]
            sys.argv[1:] = sorted(words, key=lambda word: word not in MULTIRUN)  # Hydra takes --multirun first only
            with bad_input_exits():
                check_overrides(sys.argv[1:], kind, config_name)
            hydra.main(version_base=None, config_path=str(CONF), config_name=config_name)(run)()

        return main

    return decorate


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run a command line that trains, and end this process with its exit code.

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
        sys.excepthook(type(error), error, error.__traceback__)
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


def job_name(job: DictConfig, words: list[str]) -> str:
    """The folder of a sweep's job: its number and the settings that the sweep varies, as in 0_model.decay=none."""
    parsed = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    varied = [word for word in job.overrides.task if word.lstrip("+").partition("=")[0] in swept]
    return "_".join([str(job.job.num), *varied]).replace("/", "-")


def is_first_process() -> bool:
    """Whether the launcher made this process rank 0. Known before the process group exists."""
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
            time.sleep(2)  # a launcher kills all ranks as soon as one ends; rank 0 must print its lines first
        sys.exit(BAD_INPUT)


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


def check_overrides(words: list[str], kind: type, config_name: str) -> None:
    """Compose the config once before Hydra does, to turn its errors into one line each. Of a sweep every job is
    composed and checked, so that a bad value is refused before the first job, not hours later.

    Raises:
        ConfigError: an unknown key, an unknown choice of a group, a value that a setting cannot have, a word that is
            not an override, a sweep without --multirun.
    """
    multirun = any(word in MULTIRUN for word in words)
    parsed, problems = [], []
    for word in (word for word in words if not word.startswith("-")):
        try:
            parsed += OverridesParser.create().parse_overrides([word])
        except HydraException as error:
            problems.append(
                f"not an override: {word!r}: {_first_line(error)}; it must be KEY=VALUE, and a value with spaces or "
                """signs such as = ~ [ ( { , goes in quotes of its own: "run_dir='my runs/first'\""""
            )
    swept = [override for override in parsed if override.is_sweep_override()]
    if swept and not multirun and not problems:
        problems = [f"{override.input_line}: a sweep over several values needs --multirun" for override in swept]
    if problems:
        raise ConfigError(problems)
    for job in itertools.product(*map(_values, parsed)):
        problems += _job_problems(job, kind, config_name, values=bool(swept))
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _values(override: Override) -> list[str]:
    """The override as words KEY=VALUE, one for each value that it sweeps over."""
    if not override.is_sweep_override():
        return [override.input_line]
    name = override.input_line.partition("=")[0]
    try:
        return [f"{name}={value}" for value in override.sweep_string_iterator()]
    except HydraException:
        return []  # glob(...), which only Hydra's sweeper can expand


def _job_problems(words: Sequence[str], kind: type, config_name: str, *, values: bool) -> list[str]:
    """Problems of one job of a sweep, or of a single run. values: whether to check values as well as names."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            composed = hydra.compose(config_name, overrides=list(words))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return _explain(error, words, kind)
    if not values:
        return []
    try:
        config = from_mapping(kind, OmegaConf.to_container(composed, resolve=True))
    except ConfigError as error:
        return error.problems
    except OmegaConfBaseException:
        return []  # an interpolation such as ${hydra:job.num}, which has a value only once the job runs
    return config.problems() if hasattr(config, "problems") else []


def _explain(error: Exception, words: Sequence[str], kind: type) -> list[str]:
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
    known = known_keys(kind)
    problems = []
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if key in groups:
            choices = sorted(str(path.relative_to(CONF / key).with_suffix("")) for path in (CONF / key).rglob("*.yaml"))
            if value not in choices:
                close = difflib.get_close_matches(value, choices, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                problems.append(f"{key}={value}: conf/{key} has {', '.join(choices)}{hint}")
        elif key not in known:
            problems.append(unknown_key(key, sorted({*known, *groups})))
    return problems or [_first_line(error)]


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error).strip().split("\n")[0])
