"""What can be wrong with a submission, found without a GPU and without SLURM."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from launch.submission.provenance import secrets
from launch.submission.script import is_sweep, override
from megatron_tn.config import ConfigError, differences, has_credentials, redacted, storable, to_mapping, to_stored
from megatron_tn.config.slurm import MOST_CHAIN, SubmitConfig
from megatron_tn.data import with_token_ids
from megatron_tn.outline import Outline, outline, step_with_tokens, tokens_before
from megatron_tn.planning.estimate import GIB
from megatron_tn.preflight import inspect
from megatron_tn.training.run_folder import RunFolder

HOUR = 3600.0


class Disk(NamedTuple):
    """The file system of a run's checkpoints. free, needed: bytes; needed: beside what checkpoints of the run have
    already. count: of checkpoints at a time."""

    device: int
    free: int
    needed: int
    count: int


@dataclass(frozen=True)
class Checked:
    """One run to submit. outline, disk: None where there are problems. seconds: estimated; None where
    cluster.bf16_tflops is not known. epochs: of the data. notes: what is no error, one line each."""

    config: SubmitConfig
    problems: list[str]
    notes: list[str]
    outline: Outline | None = None
    disk: Disk | None = None
    seconds: float | None = None
    epochs: float | None = None


def check(config: SubmitConfig) -> Checked:
    """The config with its token budget as stop_after, and every problem with it."""
    unusable = config.slurm.problems()
    problems = [*unusable, *_names(config), *_leaks(config), *_layout(config)]
    if config.slurm.tokens and not config.problems():
        config, found = _with_budget(config)
        problems += found
    train, world = config.train, config.world_size
    try:
        train = with_token_ids(train)
    except ConfigError as error:
        problems += error.problems
    stream, start, found = inspect(train, world, gpus=config.cluster.gpus_per_node > 0)
    problems += found
    if unusable or train.problems(world):  # no time can be told with them
        return Checked(config, list(dict.fromkeys(problems)), [])
    manifest = start.manifest if start else None
    figures = outline(train, world, manifest.step if manifest else 0)
    config, seconds, found = _time(config, figures)
    problems = list(dict.fromkeys([*problems, *found]))
    if problems:
        return Checked(config, problems, [])
    epochs = figures.tokens / config.data.sequence_length / max(stream.samples_per_epoch, 1)
    return Checked(config, [], _notes(config, figures), figures, _disk(config, figures), seconds, epochs)


def _names(config: SubmitConfig) -> Iterator[str]:
    """Problems of names that the job's script holds: run_dir, and the checkpoint of a chain."""
    run_dir = config.run_dir
    if "\\" in run_dir or not run_dir.isprintable():
        yield f"run_dir={run_dir!r}: train.sbatch takes no backslash and no control character in it"
    if "${" in run_dir:
        yield f"run_dir={run_dir}: must be a path, as a requeued job has to find the same folder"
    elif "\\" not in run_dir and is_sweep(override("run_dir", str(Path(run_dir).absolute()))):
        yield f"run_dir={run_dir}: with a comma and both kinds of quotes it reads as a sweep; choose another name"
    if config.slurm.chain != 1 and config.checkpoint.resume != "auto":
        yield (
            f"checkpoint.resume={config.checkpoint.resume} with slurm.chain={config.slurm.chain}: every job of the "
            "chain would go back to it; submit one job with it, and the chain after that"
        )


def _leaks(config: SubmitConfig) -> Iterator[str]:
    """Secrets that would lie in files: the job's script, its settings, sbatch's records."""
    hidden = secrets()
    script = {"run_dir": config.run_dir, **dict(config.slurm.words())}
    for name, value in script.items():
        if redacted(value) != value:
            yield f"{name}={value}: a secret in it would stand in the job's script"
    for name, value in _texts(to_mapping(config)):
        if has_credentials(value):
            yield f"{name}={value}: its credentials would be needed when the job starts: give them as ${{oc.env:NAME}}"
        for secret, variable in hidden.items():
            if secret in storable(value):
                shown, written = value.replace(secret, "***"), f"${{oc.env:{variable}}}"
                yield f"{name}={shown}: holds the value of the environment variable {variable}; write {written}"


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, below in values.items():
            yield from _texts(below, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for below in values:
            yield from _texts(below, name)
    elif isinstance(values, str):
        yield name, values


def _layout(config: SubmitConfig) -> Iterator[str]:
    here, gpus = config.processes_per_node, config.cluster.gpus_per_node
    if gpus and here > gpus:
        yield f"slurm.processes_per_node={here} is above cluster.gpus_per_node={gpus}: a process needs a GPU of its own"
    if config.engine.products == "fp8" and gpus and config.cluster.bf16_tflops and not config.cluster.fp8_tflops:
        yield (
            f"engine.products=fp8 needs GPUs of Hopper or later, and cluster={config.cluster.name} has no "
            "cluster.fp8_tflops, the rate of their fp8 products: set that rate, or engine.products=bf16"
        )


def _with_budget(config: SubmitConfig) -> tuple[SubmitConfig, list[str]]:
    step = step_with_tokens(config.slurm.tokens, config.train)
    if step is None:
        steps = config.schedule.steps
        return config, [
            f"slurm.tokens={config.slurm.tokens} is above the {tokens_before(steps, config.train)} tokens of "
            f"schedule.steps={steps} steps: raise schedule.steps"
        ]
    if 0 < config.stop_after < step:
        return config, [
            f"stop_after={config.stop_after} comes before step {step}, which slurm.tokens={config.slurm.tokens} needs"
        ]
    return replace(config, stop_after=step), []


def _time(config: SubmitConfig, figures: Outline) -> tuple[SubmitConfig, float | None, list[str]]:
    """The config with the number of jobs that slurm.chain=0 stands for; estimated seconds; problems."""
    slurm, cluster = config.slurm, config.cluster
    if not cluster.bf16_tflops:
        missing = ["slurm.chain=0 needs cluster.bf16_tflops, to know how many jobs the run takes"] * (slurm.chain == 0)
        return config, None, missing
    peak = figures.seconds(cluster.bf16_tflops * config.world_size)
    seconds = figures.planned_seconds or peak / slurm.utilisation
    if slurm.seconds is None:
        return config, seconds, ["slurm.chain=0 needs slurm.time"] * (slurm.chain == 0)
    job = slurm.seconds - slurm.grace_s
    if slurm.chain == 0:
        jobs = max(math.ceil(seconds / job), 1)
        if jobs > MOST_CHAIN:
            return (
                config,
                seconds,
                [
                    f"slurm.chain=0 with slurm.time={slurm.time} is {jobs:,} jobs for about {seconds / HOUR:,.0f} h, "
                    f"above {MOST_CHAIN}: raise slurm.time"
                ],
            )
        config = replace(config, slurm=replace(slurm, chain=jobs))
    elif not slurm.requeue and peak > slurm.chain * job:
        return (
            config,
            seconds,
            [
                f"slurm.time={slurm.time} and slurm.chain={slurm.chain} with slurm.requeue=false are "
                f"{slurm.chain * job / HOUR:.1f} h of training, but the run takes {peak / HOUR:.1f} h at "
                f"cluster.bf16_tflops={cluster.bf16_tflops}, and about {seconds / HOUR:.1f} h in all likelihood"
            ],
        )
    return config, seconds, []


def _disk(config: SubmitConfig, figures: Outline) -> Disk:
    checkpoints = RunFolder(config.run_dir).checkpoints.absolute()
    existing = next(folder for folder in (checkpoints, *checkpoints.parents) if folder.is_dir())
    there = (
        sum(file.stat().st_size for file in checkpoints.rglob("*") if file.is_file()) if existing == checkpoints else 0
    )
    count = max(config.checkpoint.keep, 1) + 1
    needed = count * figures.checkpoint_bytes
    return Disk(existing.stat().st_dev, shutil.disk_usage(existing).free, max(needed - there, 0), count)


def disk_problems(runs: Sequence[Checked]) -> list[str]:
    """A problem for each file system that is too small for the checkpoints of the runs together: retention keeps
    checkpoint.keep of each run's while the next one is written."""
    by_device: dict[int, list[Checked]] = {}
    for run in runs:
        if run.disk is not None:
            by_device.setdefault(run.disk.device, []).append(run)
    return [
        _too_small(group)
        for group in by_device.values()
        if sum(run.disk.needed for run in group) > min(run.disk.free for run in group)
    ]


def _too_small(group: Sequence[Checked]) -> str:
    config, disk = group[0].config, group[0].disk
    others = f" and {len(group) - 1} runs more have" if len(group) > 1 else " has"
    return (
        f"run_dir={config.run_dir}{others} {disk.free / GIB:.1f} GiB free, but {disk.count} checkpoints of "
        f"{group[0].outline.checkpoint_bytes / GIB:.1f} GiB (checkpoint.keep={config.checkpoint.keep}, and the one "
        f"being written){' a run' if len(group) > 1 else ''} need {sum(run.disk.needed for run in group) / GIB:.1f}"
    )


def _notes(config: SubmitConfig, figures: Outline) -> list[str]:
    notes, folder = [], RunFolder(config.run_dir)
    if figures.last_step <= figures.step:
        notes.append(f"the run is at step {figures.step}, its last: the job will end at once")
    if config.cluster.gpus_per_node == 0 and config.cluster.name != "cpu":
        notes.append(
            f"cluster={config.cluster.name} has gpus_per_node=0: the job asks for no GPUs, and memory is not planned"
        )
    notes += figures.concerns
    status = folder.status()
    if status.get("state") == "running":
        notes.append(f"{folder} is in use, as its status says: a job that starts before that run has ended is refused")
    if (before := folder.frozen_mapping()) is not None:
        now = to_stored(config.train)
        model = before.get("model")  # of another version of this project it may be anything
        if isinstance(model, dict):
            before |= {"model": model | _ids(now)}
        changed = differences(before | {"run_dir": now["run_dir"]}, now)
        if changed:
            notes.append(
                "settings of this submission that differ from the run's last start, and win: " + "; ".join(changed)
            )
    if not Path(config.data.manifest).is_absolute() and "://" not in config.data.manifest:
        notes.append(f"data.manifest={storable(config.data.manifest)} is read from {Path.cwd()} on every node")
    return notes


def _ids(stored: dict[str, Any]) -> dict[str, Any]:
    """The token ids of stored settings: a start takes them from the tokenizer, so they are no change."""
    return {name: stored["model"][name] for name in ("bos_id", "eos_id", "pad_id")}
