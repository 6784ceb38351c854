"""A sweep's jobs: the folder of each, and how they are listed."""

import contextlib
import hashlib
import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

log = logging.getLogger(__name__)

# Loggers of Hydra's launchers: a line for each job has all its words, and those that an experiment's groups stand for.
LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher",
)
JOB = re.compile(r"\t#\d+ : ")
LONGEST_SETTING, LONGEST_NAME = 60, 150  # characters of a sweep's folder; file systems take 255 bytes


def swept_settings(words: Sequence[str]) -> set[str]:
    """The settings and groups that overrides sweep over."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    return {override.key_or_group for override in parsed if override.is_sweep_override()}


@contextlib.contextmanager
def listed_by_swept_settings(words: Sequence[str]) -> Iterator[None]:
    """Within the block, Hydra's list of the jobs names the swept settings of each alone. words: overrides of the
    sweep."""
    swept = swept_settings(words)

    def shorten(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if job := JOB.match(said):
            with contextlib.suppress(ValueError):  # a quote within a value
                named = [word for word in shlex.split(said[job.end() :]) if _setting(word) in swept]
                record.msg, record.args = job[0] + " ".join(named), ()
        return True

    loggers = [logging.getLogger(name) for name in LAUNCHERS]
    for logger in loggers:
        logger.addFilter(shorten)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(shorten)


def _setting(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def job_folder(run_dir: str, job: DictConfig, words: list[str]) -> str:
    """The folder of one job of a sweep: job number and swept settings, such as run_dir/0_model.decay-none.

    The name consists of letters, digits and _ . + -, so that it can be typed as a setting's value. A name that is
    shortened or has characters replaced ends with a hash of the settings: the same command gives the same folders, and
    another sweep in run_dir other folders, which is told where it may surprise: a sweep with more values numbers its
    jobs anew. words: overrides of the sweep. job: Hydra's settings of the job.
    """
    swept = swept_settings(words)
    varied = [word.lstrip("+") for word in job.overrides.task if _setting(word) in swept]
    named = [re.sub(r"[^A-Za-z0-9_.+-]", "-", word.replace("'", "").replace('"', "")) for word in varied]
    short = [name if len(name) <= LONGEST_SETTING else f"{name[:30]}..{name[-28:]}" for name in named]
    name = "_".join([str(job.job.num), *short])[:LONGEST_NAME]
    plain = "_".join([str(job.job.num), *(word.replace("=", "-", 1) for word in varied)])
    if name != plain:
        name += f"-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
    earlier = Path(run_dir) / "_".join([str(job.job.num), *varied]).replace("/", "-")  # the name until 2026-11
    with contextlib.suppress(OSError):  # too long for a file system
        if earlier.is_dir():
            return str(earlier)
    folder = Path(run_dir) / name
    if alike := _with_another_number(folder):
        log.info(
            "%s begins anew, beside %s of the same swept values: the number is the job's place in the sweep, which has "
            "other values now. To add values, sweep those alone in another run_dir; launch.compare takes several",
            folder,
            alike,
        )
    return f"{run_dir}/{name}"


def _with_another_number(folder: Path) -> Path | None:
    """For a job's folder that is not there, one beside it that has the same name but for the job's number, if any."""
    name = folder.name.partition("_")[2]
    if not name or folder.exists():
        return None
    beside = sorted(folder.parent.glob(f"*_{name}"))
    return next((path for path in beside if path.name.removesuffix(f"_{name}").isdecimal()), None)
