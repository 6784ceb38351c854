"""What `python -m launch.submit` leaves in a run's folder, one folder for each submission.

    run_dir/submitted/20261129-203459-1a2b3c4d/
      config.json       the run's settings as they were at submission: what the job trains with (training/freeze.py)
      job.sbatch        the job's script
      submission.json   command, revision of the code, shape of the job, and the ids that sbatch gave
      code.diff         what the checkout had beside that revision; absent where nothing
      packages.txt      Python and its packages, name==version
      JOB.log           what the job says; JOB_TASK.log in a job array

A sweep is one job array: its folder has all of these but config.json, which is in the folder of each task's run.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_tn.config import TrainConfig, open_new, regular, save
from megatron_tn.training.run_folder import RunFolder


@dataclass(frozen=True)
class Submission:
    SCRIPT: ClassVar[str] = "job.sbatch"
    RECORD: ClassVar[str] = "submission.json"

    path: Path

    @classmethod
    def new(cls, folder: RunFolder, name: str = "") -> Submission:
        """A new folder in run_dir/submitted. name: that the submissions of a sweep share; empty: a name of its own."""
        name = name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
        submission = cls(folder.submitted.absolute() / name)
        submission.path.mkdir(parents=True)
        return submission

    @classmethod
    def all_of(cls, folder: RunFolder) -> list[Submission]:
        """The submissions of a run or of a sweep, oldest first."""
        return [cls(path.parent) for path in sorted(folder.submitted.glob(f"*/{cls.RECORD}"))]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def script(self) -> Path:
        return self.path / self.SCRIPT

    @property
    def run_dir(self) -> Path:
        return self.path.parent.parent

    def freeze(self, config: TrainConfig) -> None:
        save(config, self.config_file)

    def write(self, name: str, content: str) -> Path:
        path = self.path / name
        with open_new(path) as file:
            file.write(content)
        return path

    def record(self, values: dict[str, Any]) -> None:
        """Write, or replace, submission.json."""
        partial = self.write(f"{self.RECORD}.tmp", json.dumps(values, indent=1) + "\n")
        partial.replace(self.path / self.RECORD)

    def read(self) -> dict[str, Any]:
        """submission.json; empty where it is absent or damaged."""
        try:
            found = json.loads(regular(self.path / self.RECORD).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
