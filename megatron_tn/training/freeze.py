"""Which settings a start runs: those of its command line, or those that run_dir/config.json was frozen with."""

from __future__ import annotations

import os
from dataclasses import replace

from megatron_tn.config import TrainConfig, differences, to_mapping
from megatron_tn.training.run_folder import RunFolder


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
    requeued runs exactly what itself has frozen, whatever happened to YAML files since; run_dir stays as the command
    line spells it, from where this process stands. Any other start runs what its command line asks for, also in the
    folder of an earlier one.

    Raises:
        ConfigError: config.json is damaged.
    """
    before = folder.frozen_mapping()
    if before is None:
        return config, []
    own = is_requeued() and folder.is_frozen_by(slurm_job())
    frozen = replace(folder.frozen_config(), run_dir=config.run_dir) if own else config
    changed = differences(before | {"run_dir": config.run_dir}, to_mapping(config))
    if not changed:
        return frozen, []
    side = f"{folder.config_file} wins, because SLURM requeued this job" if own else "the new settings win"
    return frozen, [f"settings differ from those in {folder.config_file}; {side}:", *changed]
