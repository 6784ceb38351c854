"""Train two commits, or two configs, and compare the loss of every step.

    python -m launch.compare_losses --commits main HEAD -- model=demo data.manifest=... schedule.steps=20
    python -m launch.compare_losses --configs engine=zero1 engine=zero3 --bound 1e-5 -- model=demo data.manifest=...
    python -m launch.compare_losses --commits v1 v2 --processes 2 -- parallel.tp=2 ...

The words after -- are overrides of both runs. Each argument of --configs holds the overrides of one run (several in one
argument: "parallel.tp=2 engine=zero1"). The runs are deterministic, with the same seed and without checkpoints, one
after the other. A commit is trained in a temporary git worktree, a config in this checkout. Paths in settings are
relative to the current folder.

Loss and gradient norm of every step must be bitwise equal or, with --bound B, have a relative difference of at most B.
Prints the first step that differs and the difference at the last step. Exit code 0: equal; 1: they differ, or one has
fewer steps; 2: a run failed, or the command is wrong.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_tn.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
EQUAL, DIFFERENT, FAILED = 0, 1, 2
COMPARED = ("loss", "grad_norm")
FIXED = ("deterministic=true", "logging=quiet", "checkpoint.every=0", "checkpoint.at_end=false")

Steps = dict[int, dict[str, float | None]]  # step -> value of each name in COMPARED; None where not finite


class Failed(Exception):
    """A run or git command failed; the message has the command and its last lines of output."""


def difference(one: float | None, other: float | None) -> float:
    """|one - other| / max(|one|, |other|); 0 if both are None (not finite), infinity if only one is None."""
    if one == other:
        return 0.0
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / max(abs(one), abs(other))


def compare(one: Steps, other: Steps, bound: float) -> list[str]:
    """Lines on the first step that differs and on the last common step; empty if the runs agree."""
    lines = []
    if missing := sorted(one.keys() ^ other.keys()):
        where = "the second" if missing[0] in one else "the first"
        lines.append(f"step {missing[0]} is missing from {where} run: {len(one)} and {len(other)} steps")
    common = sorted(one.keys() & other.keys())
    if not common:
        return lines or ["neither run has a step"]
    for name in COMPARED:
        apart = {step: difference(one[step][name], other[step][name]) for step in common}
        if over := [step for step in common if apart[step] > bound]:
            first, last = over[0], common[-1]
            lines.append(
                f"step {first}: {name} {one[first][name]!r} and {other[first][name]!r}, {apart[first]:.1e} apart; "
                f"{len(over)} of {len(common)} steps differ, and step {last} by {apart[last]:.1e}"
            )
    return lines


def train(checkout: Path, words: list[str], folder: Path, processes: int) -> Steps:
    """Train from the sources in `checkout` and read the journal. Raises Failed."""
    launcher = ["-m", "launch.torchrun", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_tn.train", *words, *FIXED, f"run_dir={folder}"]
    paths = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[-15:])
        raise Failed(f"exit code {done.returncode} of {shlex.join(command[1:])}\n{said}")
    return {record["step"]: {name: record[name] for name in COMPARED} for record in RunFolder(folder).records("loss")}


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """A git worktree of `commit` in `folder`, removed after the block. Raises Failed if there is no such commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    done = subprocess.run([*git, "add", "--detach", str(folder), commit], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"--commits {commit}: {done.stderr.strip().splitlines()[-1]}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.compare_losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sides = parser.add_mutually_exclusive_group(required=True)
    sides.add_argument("--commits", nargs=2, metavar=("OLD", "NEW"), help="git commits, branches or tags")
    sides.add_argument(
        "--configs", nargs=2, metavar=("ONE", "OTHER"), help="KEY=VALUE of the first run, and of the second"
    )
    parser.add_argument("--bound", type=float, default=0.0, help="relative difference allowed (default 0: bit for bit)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each run, on this machine (default 1)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of both runs, after --")
    options = parser.parse_args(arguments)
    for name, least in (("bound", 0), ("processes", 1)):
        if not getattr(options, name) >= least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    names = options.commits or options.configs
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            runs = []
            for number, name in enumerate(names):
                checkout, words = ROOT, [*options.settings]
                if options.commits:
                    checkout = stack.enter_context(worktree(name, Path(folder) / f"checkout_{number}"))
                else:
                    words += shlex.split(name)
                runs.append(train(checkout, words, Path(folder) / f"run_{number}", options.processes))
                print(f"{name}: {len(runs[-1])} steps", flush=True)
    except Failed as failed:
        print(f"error: {failed}", file=sys.stderr)
        return FAILED
    if lines := compare(*runs, options.bound):
        print("\n".join(lines))
        return DIFFERENT
    print("every step agrees " + (f"to {options.bound:g}" if options.bound else "bit for bit"))
    return EQUAL


if __name__ == "__main__":
    sys.exit(main())
