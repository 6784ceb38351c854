"""What can be known to be wrong before anything is started or overwritten, all of it at once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from megatron_tn.checkpoint.manifest import Manifest, checkpoint_name, step_of, whole_checkpoints
from megatron_tn.checkpoint.verify import newest_whole
from megatron_tn.config import ConfigError, TrainConfig, device_problems, differences, load, read_mapping, to_mapping
from megatron_tn.engine.deepspeed.settings import deepspeed_settings
from megatron_tn.planning.remedies import memory_problems
from megatron_tn.training.state import TrainingState

FROZEN = "config.json"
CHECKPOINTS = "checkpoints"


def frozen_config(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The config this process must run, and lines that say what differs from an earlier start of the same run.

    The first start writes the resolved config to run_dir/config.json. A job that SLURM requeued runs exactly that,
    whatever has happened to YAML files since. A person who starts the run again gets what they asked for.

    Raises:
        ConfigError: run_dir/config.json is damaged.
    """
    path = Path(config.run_dir) / FROZEN
    if not path.is_file():
        return config, []
    # A requeued job goes on where it was, also when its first start was asked to begin from an older checkpoint.
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    try:
        before = read_mapping(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; move it away, and the run goes on with the settings of this command") from None
    frozen = load(path) if requeued else config
    if requeued and whole_checkpoints(Path(config.run_dir) / CHECKPOINTS):
        frozen = replace(frozen, checkpoint=replace(frozen.checkpoint, resume="auto"))
    changed = differences(before, to_mapping(config))
    if not changed:
        return frozen, []
    side = f"{path} wins, because SLURM requeued this job" if requeued else "the new settings win"
    return frozen, [f"settings differ from those in {path}; {side}:", *changed]


def problems_before_start(config: TrainConfig, world_size: int, tokenizer_vocab: int | None) -> list[str]:
    """One line for each thing that would make the run fail later. tokenizer_vocab: of the shards, where known."""
    found = [*config.problems(world_size), *device_problems(config, cuda=torch.cuda.is_available())]
    if tokenizer_vocab is not None and config.model.vocab_size < tokenizer_vocab:
        found.append(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {tokenizer_vocab} entries of the "
            f"tokenizer that made data.manifest={config.data.manifest}"
        )
    checkpoints = Path(config.run_dir).absolute() / CHECKPOINTS
    existing = next(folder for folder in (checkpoints, *checkpoints.parents) if folder.exists())
    if not existing.is_dir():
        found.append(f"run_dir={config.run_dir} cannot be written: {existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        found.append(f"run_dir={config.run_dir} cannot be written: no permission in {existing}")
    if not found:
        dp = world_size // (config.parallel.tp * config.parallel.cp)
        try:
            if config.engine.name == "deepspeed":
                deepspeed_settings(config, dp)
            if (start := checkpoint_to_resume(config)) is not None:
                found += _checkpoint_problems(config, start)
            found += memory_problems(config, world_size)
        except ConfigError as error:
            found += error.problems
    return found


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint that checkpoint.resume asks for, or None for a fresh start.

    Raises:
        ConfigError: one was asked for by name and is not there, or a fresh start would mix with an earlier run's files,
            or every checkpoint there is damaged.
    """
    asked = config.checkpoint.resume
    folder = Path(config.run_dir) / CHECKPOINTS
    if asked == "auto":
        return newest_whole(folder)
    there = whole_checkpoints(folder)
    if asked == "none":
        if there:
            raise ConfigError(
                f"checkpoint.resume=none, but run_dir={config.run_dir} already holds {there[-1].name}; choose another "
                "run_dir, or resume with checkpoint.resume=auto"
            )
        return None
    start = folder / checkpoint_name(int(asked)) if str(asked).isdecimal() else Path(str(asked))
    if not str(asked).strip() or not start.is_dir():
        steps = ", ".join(str(step_of(path)) for path in there) or "none"
        raise ConfigError(f"checkpoint.resume={asked} does not exist; run_dir={config.run_dir} has steps: {steps}")
    try:
        Manifest.read(start)
    except ConfigError as error:
        raise ConfigError(f"checkpoint.resume={asked}: {error}") from None
    return start


def _checkpoint_problems(config: TrainConfig, directory: Path) -> list[str]:
    manifest = Manifest.read(directory)
    stored, wanted = manifest.config["model"], to_mapping(config.model)
    changed = [line for line in differences(stored, wanted) if not line.startswith(("name:", "init_std:"))]
    found = [f"checkpoint {directory} holds another model: {line}" for line in changed]
    if manifest.step > config.schedule.steps:
        found.append(f"checkpoint {directory} is at step {manifest.step}, past schedule.steps={config.schedule.steps}")
    try:
        ledger = TrainingState.from_json(manifest.training).skip
    except ConfigError as error:
        return [*found, *(f"checkpoint {directory} is damaged: training: {problem}" for problem in error.problems)]
    if trained := sorted(batch for batch in config.data.skipped if batch <= manifest.step and batch not in ledger):
        found.append(
            f"data.skip_batches: checkpoint {directory} has trained on batch {trained[0]} already; resume from one "
            f"before it, with checkpoint.resume=STEP and a step below {trained[0]}"
        )
    return found
