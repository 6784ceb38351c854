"""What is imported is required by name and pinned, and what is required is imported; the lock file agrees."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("kernels", "megatron_tn", "data_pipeline", "launch", "tests")
# Distributions whose module has another name.
MODULES = {"flash-linear-attention": "fla", "hydra-core": "hydra", "pyyaml": "yaml"}
TOOLS = {"pytest-xdist", "ruff"}  # are run and not imported
FOR_OTHERS = {"regex"}  # imported by a requirement that does not require it: datatrove
WRITTEN = {"mine"}  # by a test, for itself
BUILT = {"apex", "lightning_attn"}  # from source, by those who have them
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """{distribution, as PyPI normalises it: version}."""
    return {name.lower().replace("_", "-"): version for name, version in PIN.findall(text)}


REQUIRED = pins((ROOT / "requirements.txt").read_text())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@functools.cache
def imported() -> frozenset[tuple[str, str]]:
    """(module, file) of every import of another project, wherever in a file it stands."""
    found = set()
    for path in (path for package in OWN for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - {*OWN, *WRITTEN, *sys.stdlib_module_names}:
                found.add((name, str(path.relative_to(ROOT))))
    return frozenset(found)


def test_what_is_imported_is_required_by_name():
    extras = pins("\n".join(line for lines in EXTRAS.values() for line in lines))
    known = {MODULES.get(name, name.replace("-", "_")) for name in (*REQUIRED, *extras)} | BUILT
    assert not {f"{file}: {name}" for name, file in imported() if name not in known}


def test_what_is_required_is_imported():
    names = {name for name, _ in imported()}
    unused = {name for name in REQUIRED if MODULES.get(name, name.replace("-", "_")) not in names}
    assert unused == TOOLS | FOR_OTHERS


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_are_pinned(extra):
    assert all(PIN.fullmatch(line) for line in EXTRAS[extra])


def test_every_line_is_pinned_and_the_lock_file_agrees():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) == len(REQUIRED)
    lock = (ROOT / "requirements.lock").read_text()
    locked = pins(lock)
    assert REQUIRED.items() <= locked.items()
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert len(entries) >= len(locked)
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in lock
