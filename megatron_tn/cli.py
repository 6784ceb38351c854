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

        def run(composed: DictConfig) -> None:
            with bad_input_exits(), closed_pipe_exits():
                values = OmegaConf.to_container(composed, resolve=True) | texts
                multirun = HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN
                if multirun:
                    values["run_dir"] = f"{values['run_dir']}/{job_name(HydraConfig.get(), sys.argv[1:])}"
                if function(from_mapping(kind, values)) and multirun:
                    log.info("told to stop: the sweep ends here, and the same command goes on with it")
                    sys.exit(0)

        def main() -> None:
            logging.basicConfig(level=logging.INFO if is_first_process() else logging.WARNING, format="%(message)s")
            pairs = [word.partition("=") for word in sys.argv[1:]]
            texts.update({key: value for key, equals, value in pairs if equals and key in literal})
            # The deepspeed launcher adds --local_rank, which says nothing that LOCAL_RANK does not.
            aside = {*literal, "--local_rank"}
            words = ["".join(pair) for pair in pairs if pair[0] not in aside]
            sys.argv[1:] = sorted(words, key=lambda word: word not in MULTIRUN)  # Hydra takes it in front alone
            with bad_input_exits():
                check_overrides(sys.argv[1:], kind, config_name)
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


def job_name(job: DictConfig, words: list[str]) -> str:
    """A sweep's job by its number and the settings that the sweep varies: 0_model.decay=none."""
    parsed = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    varied = [word for word in job.overrides.task if word.lstrip("+").partition("=")[0] in swept]
    return "_".join([str(job.job.num), *varied]).replace("/", "-")


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


def check_overrides(words: list[str], kind: type, config_name: str) -> None:
    """Compose before Hydra does, to turn its errors into one line each. Of a sweep every job is composed and checked,
    so that none is refused after hours of those before it.

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
    """The override as a word, once for each of its values."""
    if not override.is_sweep_override():
        return [override.input_line]
    name = override.input_line.partition("=")[0]
    try:
        return [f"{name}={value}" for value in override.sweep_string_iterator()]
    except HydraException:
        return []  # glob(*), which Hydra itself expands


def _job_problems(words: Sequence[str], kind: type, config_name: str, *, values: bool) -> list[str]:
    """values: whether to look at values too, and not at names alone."""
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
        return []  # refers to what Hydra knows of a job once it runs
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
