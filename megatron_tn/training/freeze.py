"""Choose the settings of this start: the command line's, or those frozen in run_dir/config.json."""

import os
from pathlib import Path
from typing import Any

from megatron_tn.config import TrainConfig, differences, from_stored, read_mapping, storable, to_stored
from megatron_tn.parallel.world import number
from megatron_tn.training.run_folder import SUBMITTED, RunFolder


def slurm_job() -> str | None:
    """This process's SLURM job id, which a requeued job keeps."""
    return os.environ.get("SLURM_JOB_ID") or None


def is_requeued() -> bool:
    """Whether SLURM restarted this job, after a node failure or the job's own `scontrol requeue`."""
    return number("SLURM_RESTART_COUNT", default=0) > 0


def goes_on(folder: RunFolder) -> bool:
    """Whether this job was requeued after it had begun to train in `folder`. It then resumes from its newest
    checkpoint, and checkpoint.resume is ignored."""
    return is_requeued() and folder.is_begun_by(slurm_job())


def settings_of_this_start(config: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, list[str]]:
    """The settings of this process, and lines to print about their differences from the previous start's.

    Every start freezes its settings in run_dir/config.json, and its job id in job.json. A requeued job runs the
    settings it froze, even if YAML files changed since; a job of launch.submit those frozen at submission, and its
    command line has run_dir alone. run_dir is taken from the command line in both cases. No file has secrets:
    `${oc.env:NAME}` is resolved again, and the credentials of a URL are the command line's. Any other start runs its
    command line's settings, also in the folder of an earlier start.

    Raises:
        ConfigError: config.json, or the submission's settings file, is damaged, or a secret of it is not there.
    """
    before, notes = folder.frozen_mapping(), []
    submitted = os.environ.get(SUBMITTED)
    if is_requeued() and folder.is_frozen_by(slurm_job()):
        frozen, now = folder.config_file, None if submitted else config
    elif submitted:
        frozen, now = Path(submitted), None
        if changed := _differences(before, read_mapping(frozen)):
            wins = "those that the job was submitted with win:"
            notes = [f"settings differ from those in {folder.config_file}; {wins}", *changed]
    else:
        changed = _changed(before, config)
        if changed:
            notes = [f"settings differ from those in {folder.config_file}; the new settings win:", *changed]
        return config, notes
    values = read_mapping(frozen)
    if now is not None and (changed := _changed(values, now)):
        notes = [f"settings differ from those in {frozen}; {frozen} wins, because SLURM requeued this job:", *changed]
    return from_stored(TrainConfig, values | {"run_dir": config.run_dir}, config), notes


def _changed(before: dict[str, Any] | None, config: TrainConfig) -> list[str]:
    """Settings of `config` that differ from `before`."""
    return _differences(before, to_stored(config))


def _differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """The settings that differ, without run_dir, which may be absolute or relative."""
    return [] if before is None else differences(storable(before) | {"run_dir": now["run_dir"]}, storable(now))
