"""Measurements as flat JSON rows, one per line, with commit, command and machine.

Every row has the keys of `provenance`, and name, unit and value; other keys describe the measurement.
"""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE = "MEGATRON_TN_COMMIT"  # environment variable: the commit, for sources outside a git checkout


@functools.cache
def provenance() -> dict[str, Any]:
    """commit (None where unknown), dirty (whether tracked files differ from the commit), command, date (UTC), gpu (None
    without one), cpu, and the versions of torch, triton, deepspeed (None where not installed) and python."""
    commit = _git("rev-parse", "HEAD") or os.environ.get(COMMIT_VARIABLE) or None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "command": command(sys.orig_argv, dict(os.environ)),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu(),
        **{name: _version(name) for name in ("torch", "triton", "deepspeed")},
        "python": platform.python_version(),
    }


def row(name: str, unit: str, value: float | None, **extras: Any) -> dict[str, Any]:
    """One measurement as a row. extras: further keys with plain values, such as model, layout, sequence_length."""
    return {**provenance(), "name": name, "unit": unit, "value": value, **extras}


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    ends = not path.is_file() or path.read_bytes()[-1:] in (b"\n", b"")  # an editor, or a kill, may leave no newline
    with path.open("a") as file:
        file.write("" if ends else "\n")
        file.writelines(json.dumps(found) + "\n" for found in rows)


def command(words: list[str], environment: Mapping[str, str]) -> str:
    """This process's command line as typed in a shell; the launcher's part is reconstructed from `environment`."""
    start = words.index("-m") if "-m" in words else 1
    processes = int(environment.get("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", 1)))
    launcher = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    return shlex.join([*launcher, *words[start:]])


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
