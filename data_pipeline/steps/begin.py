"""The first step of every stage."""

import errno
import fcntl
import os
import time
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.errors import StageError
from data_pipeline.files import open_lock

MARKER_SECONDS = 60  # delay until a shared file system shows the previous stage's completion markers


class BeginTask(PipelineStep):
    """First step of every stage: checks that the previous stage is complete, and locks the task for this process.

    The check of completion markers protects against a SLURM array that lost tasks: the stage would run on partial
    input. The lock ends with the process or its next task: workers of a killed run may live on for a moment, and the
    next run's worker waits here until they end.
    """

    type = "🔒 - LOCK"
    name = "begin task"
    _held = None

    def __init__(self, stage: Path, before: Path | None = None, tasks_before: int = 0):
        super().__init__()
        self.stage = stage
        self.before = before
        self.tasks_before = tasks_before

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self._see_stage_before()
        (self.stage / "locks").mkdir(parents=True, exist_ok=True)
        lock = open_lock(self.stage / "locks" / f"{rank:05d}")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: SLURM starts each task only once
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        BeginTask._held = lock
        return data

    def _see_stage_before(self) -> None:
        for attempt in range(MARKER_SECONDS):
            if not self.before or not (missing := missing_tasks(self.before, self.tasks_before)):
                return
            time.sleep(attempt and 1)
        raise StageError(f"stage {self.before.name}: {len(missing)} tasks are not complete, the first is {missing[0]}")


def missing_tasks(stage: Path, tasks: int) -> list[int]:
    """The tasks of a stage without a completion marker in its folder."""
    folder = stage / "completions"
    done = set(os.listdir(folder)) if folder.is_dir() else set()
    return [rank for rank in range(tasks) if f"{rank:05d}" not in done]
