"""Which settings a start runs: those of its command line, or those that run_dir/config.json was frozen with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tn.config import TrainConfig, differences, load, read_mapping, to_mapping
from megatron_tn.training.run_folder import SUBMITTED, RunFolder


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to; a requeued job keeps its number."""
    return os.environ.get("SLURM_JOB_ID") or None


def is_requeued() -> bool:
    """Whether SLURM starts this job again, after a node failed or the job put itself back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def goes_on(folder: RunFolder) -> bool:
    """Whether this is a job that SLURM requeued after it began to train here: it goes on from its newest checkpoint,
    whatever checkpoint.resume asked of its first start."""
    return is_requeued() and folder.is_begun_by(slurm_job())


def settings_of_this_start(config: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, list[str]]:
    """The settings that this process must run, and lines for people that say how they differ from an earlier start's.

    Every start freezes its settings in run_dir/config.json, and the job it belongs to in job.json. A job that SLURM
    requeued runs exactly what itself has frozen, whatever happened to YAML files since, and a job of launch.submit what
    was frozen at its submission; run_dir stays as the command line spells it, from where this process stands. Any other
    start runs what its command line asks for, also in the folder of an earlier one.

    Raises:
        ConfigError: config.json, or the file of the submission, is damaged.
    """
    before, notes = folder.frozen_mapping(), []
    if is_requeued() and folder.is_frozen_by(slurm_job()):
        frozen, why = folder.config_file, "SLURM requeued this job"
    elif submitted := os.environ.get(SUBMITTED):
        frozen, why = Path(submitted), "this job was submitted with it"
    else:
        changed = _changed(before, config)
        if changed:
            notes = [f"settings differ from those in {folder.config_file}; the new settings win:", *changed]
        return config, notes
    if changed := _changed(read_mapping(frozen), config):
        notes = [f"settings differ from those in {frozen}; {frozen} wins, because {why}:", *changed]
    return replace(load(frozen), run_dir=config.run_dir), notes


def _changed(before: dict[str, Any] | None, config: TrainConfig) -> list[str]:
    """Settings of `config` that differ from earlier ones, but for run_dir, which may be spelt in several ways."""
    return [] if before is None else differences(before | {"run_dir": config.run_dir}, to_mapping(config))
