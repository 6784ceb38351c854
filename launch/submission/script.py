"""The text of a job's script. Every value from a config is one quoted word, for sbatch and for bash."""

import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from megatron_tn.config.slurm import SubmitConfig
from megatron_tn.training.run_folder import SUBMITTED
from megatron_tn.training.submission import Submission

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch/train.sbatch"


def sbatch_options(config: SubmitConfig, submission: Submission, tasks: int) -> list[str]:
    """The job's options for sbatch. tasks: number of tasks of a job array; 0 for a job of one run."""
    slurm = config.slurm
    folder = str(submission.path).replace("%", "%%")  # sbatch replaces %j and the like
    found = {
        "job-name": job_name(config, submission),
        "nodes": config.nodes,
        "ntasks-per-node": 1,  # srun starts one task per node, which starts the processes
        "open-mode": "append",  # a requeued job goes on in the same log
        "output": f"{folder}/%A_%a.log" if tasks else f"{folder}/%j.log",
        "signal": f"B:USR1@{slurm.grace_s}",
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
    }
    if slurm.gres and config.cluster.gpus_per_node:
        found["gres"] = f"{slurm.gres}:{config.cluster.gpus_per_node}"
    if tasks:
        found["array"] = f"0-{tasks - 1}" + (f"%{slurm.at_once}" if slurm.at_once else "")
    options = [f"--{name}={value}" for name, value in found.items() if value is not None]
    options.append("--requeue" if slurm.requeue else "--no-requeue")
    options += ["--exclusive"] if slurm.exclusive else []
    return [*options, *slurm.options]


def job_name(config: SubmitConfig, submission: Submission) -> str:
    return config.slurm.job_name or submission.run_dir.name


def script(
    config: SubmitConfig, submission: Submission, runs: Sequence[tuple[str, Path]], revision: str, *, array: bool
) -> str:
    """The text of the job's script. runs: run_dir, absolute, and frozen settings of each task of a job array; one for a
    job of one run."""
    slurm = config.slurm
    lines = [
        "#!/usr/bin/env bash",
        f"# Written by `python -m launch.submit` on {time.strftime('%Y-%m-%d at %H:%M:%S')}.",
    ]
    options = sbatch_options(config, submission, len(runs) if array else 0)
    lines += [f"#SBATCH {shlex.quote(option)}" for option in options]
    lines += ["", f"cd {shlex.quote(str(Path.cwd()))} || exit 2"]
    variables = {
        "MEGATRON_TN_CHECKOUT": str(ROOT),
        "MEGATRON_TN_FAILURES": slurm.failures,
        "MEGATRON_TN_REQUEUE": "yes" if slurm.requeue else "no",
        "MEGATRON_TN_CHAIN": submission.name if slurm.chain != 1 else "",
        "NPROC_PER_NODE": config.processes_per_node,
        **slurm.environment,
    }
    lines += [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]
    if array:
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        for number, (run_dir, settings) in enumerate(runs):
            word, file = shlex.quote(override("run_dir", run_dir)), shlex.quote(str(settings))
            lines.append(f"  {number}) run={word} {SUBMITTED}={file} ;;")
        lines += ['  *) echo "no run for task $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;', "esac", f"export {SUBMITTED}"]
    else:
        ((run_dir, settings),) = runs
        lines += [
            f"run={shlex.quote(override('run_dir', run_dir))}",
            f"export {SUBMITTED}={shlex.quote(str(settings))}",
        ]
    if slurm.modules:
        lines.append("command -v module >/dev/null || . /etc/profile")
        lines += [f"module load {shlex.quote(name)} || exit 2" for name in slurm.modules]
    if revision:
        root = shlex.quote(str(ROOT))
        lines += [
            f"now=$(git -C {root} rev-parse HEAD 2>/dev/null)",
            f'[ "${{now:-{revision}}}" = {revision} ] ||',
            f'  echo "the code has changed since submission: $now is checked out, and it was {revision}" >&2',
        ]
    before = [f"--srun={word}" for word in slurm.srun] + [f"--container={word}" for word in slurm.container]
    # exec: SLURM signals this process, and train.sbatch is what listens.
    lines.append(" ".join(["exec bash", *map(shlex.quote, [str(TRAIN), *before]), '"$run"']))
    return "\n".join(lines) + "\n"


def override(key: str, path: str) -> str:
    """KEY=PATH in Hydra's grammar as train.sbatch reads it too: quoted where Hydra would take a comma for a sweep."""
    if "," in path:
        for quote in "'\"":
            if quote not in path:
                return f"{key}={quote}{path}{quote}"
    return f"{key}={path}"


def is_sweep(word: str) -> bool:
    """Whether an override is one over several values; False for what Hydra cannot parse, which is quoted as a whole."""
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return False


def job_number(said: str) -> str:
    """The job's number in what sbatch printed: `--parsable` prints 17, or 17;CLUSTER. Raises ValueError."""
    found = re.search(r"\d+", said)
    if not found:
        raise ValueError(f"sbatch printed no job number: {said.strip()!r}")
    return found[0]
