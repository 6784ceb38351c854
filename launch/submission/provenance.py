"""What code and packages a run was submitted with, and which values must stand in no file of it."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_tn.config import redacted

ROOT = Path(__file__).resolve().parents[2]
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)  # in the name of an environment variable
SHORTEST = 6  # characters of a secret: a shorter value may be part of any word
FOLDERS = ("kernels", "megatron_tn", "data_pipeline", "launch", "conf")  # untracked files elsewhere are no code
MOST_DIFF = 20_000_000  # characters of code.diff


@dataclass(frozen=True)
class Code:
    """revision: of the checkout; empty where it is none of git's. diff: of the files against it, and new ones of
    FOLDERS."""

    revision: str
    diff: str


def code() -> Code:
    """The checkout's state, without secrets. It changes nothing in the checkout, its index included."""
    try:
        revision = _git("rev-parse", "HEAD").strip()
        index = Path(ROOT, _git("rev-parse", "--git-path", "index").strip())
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "index")
            shutil.copyfile(index, copy)
            _git("add", "--intent-to-add", "--", *FOLDERS, index=copy)
            diff = _git("diff", "HEAD", index=copy)
    except (OSError, subprocess.CalledProcessError):
        return Code("", "")
    if len(diff) > MOST_DIFF:
        diff = diff[:MOST_DIFF] + "\n(cut off here)\n"
    return Code(revision, without_secrets(diff))


def _git(*words: str, index: Path | None = None) -> str:
    environment = os.environ | ({"GIT_INDEX_FILE": str(index)} if index else {})
    command = ["git", "-C", str(ROOT), "-c", "core.fsmonitor=false", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, check=True, text=True, errors="replace", timeout=60
    ).stdout


def packages() -> str:
    """Python and every installed package, name==version, one a line."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    lines = sorted((f"{name}=={version}" for name, version in found.items() if name), key=str.lower)
    return "\n".join([f"# Python {platform.python_version()}, {platform.platform()}", *lines]) + "\n"


def secrets() -> dict[str, str]:
    """Value -> name of the environment variables that are secrets by their name. A value that is a path is none."""
    return {
        value: name
        for name, value in os.environ.items()
        if SECRET.search(name) and len(value) >= SHORTEST and not os.path.exists(value)
    }


def without_secrets(text: str) -> str:
    for value, name in sorted(secrets().items(), key=lambda pair: -len(pair[0])):
        text = text.replace(value, f"${{oc.env:{name}}}")
    return redacted(text)
