"""Submit a training run to SLURM with its settings frozen at submission.

    python -m launch.submit --nodes=16 --gres=gpu:8 --time=24:00:00 -- model=7b parallel.tp=8 run_dir=runs/7b

Arguments before -- go to sbatch; those after it are overrides for launch/train.sbatch. The settings are composed and
checked at submission and written to run_dir/submitted/. The job uses them at every start and requeue, even if YAML
files have changed. Exit code 2 for bad settings; else sbatch's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_tn.cli import command
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.training.run_folder import SUBMITTED, RunFolder

SCRIPT = Path(__file__).with_name("train.sbatch")


def main() -> None:
    if "--" not in sys.argv:
        print("usage: python -m launch.submit SBATCH_OPTION... -- OVERRIDE...", file=sys.stderr)
        sys.exit(2)
    end = sys.argv.index("--")
    options, words = sys.argv[1:end], sys.argv[end + 1 :]
    sys.argv[1:] = words

    def submit(config: TrainConfig) -> int:
        problems = config.problems()
        if "\\" in config.run_dir or not config.run_dir.isprintable():
            problems.append(
                f"run_dir={config.run_dir!r}: train.sbatch takes no backslash and no control character in it"
            )
        if any(word.lstrip("+").startswith("run_dir=") and "${" in word for word in words):
            problems.append("run_dir must be a path: a requeued job has to find the same folder")
        if problems:
            raise ConfigError(problems)
        settings = RunFolder(config.run_dir).submit(config)
        environment = os.environ | {SUBMITTED: str(settings.absolute())}
        return subprocess.run(["sbatch", *options, str(SCRIPT), *words], env=environment, check=False).returncode

    command(TrainConfig, "config")(submit)()


if __name__ == "__main__":
    main()
