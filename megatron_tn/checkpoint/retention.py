"""Removal of old checkpoints. It follows a complete save, and spares a checkpoint that a process reads."""

import contextlib
import fcntl
import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_tn.checkpoint.manifest import MANIFEST, step_of, whole_checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """A checkpoint is kept when any of the three rules keeps it.

    newest: the `newest` latest ones; 0 keeps all. every: those whose step is a multiple of `every`; 0: no such rule.
    best: the `best` ones with the lowest held-out loss, of those evaluated at their own step.
    """

    newest: int = 0
    every: int = 0
    best: int = 0


class Saved(NamedTuple):
    """A complete checkpoint, its step, and the held-out loss of that step (None: not evaluated)."""

    path: Path
    step: int
    loss: float | None = None


def superfluous(saved: Sequence[Saved], retention: Retention) -> list[Path]:
    """The checkpoints that no rule keeps, oldest first. The newest is always kept."""
    if retention.newest == 0:
        return []
    by_age = sorted(saved, key=lambda one: one.step)
    kept = {one.path for one in by_age[-retention.newest :]}
    if retention.every:
        kept |= {one.path for one in by_age if one.step % retention.every == 0}
    # NaN compares false with every number and would break the sort.
    evaluated = [one for one in by_age if one.loss is not None and not math.isnan(one.loss)]
    evaluated.sort(key=lambda one: one.loss)
    kept |= {one.path for one in evaluated[: retention.best]}
    return [one.path for one in by_age if one.path not in kept]


def apply_retention(folder: Path, retention: Retention) -> list[Path]:
    """Remove the checkpoints in `folder` that no rule keeps; returns their paths. Called after a save, on one rank.

    Never raises: a failed removal is logged as a warning, and the next save tries again.
    """
    gone = []
    try:
        saved = [_describe(path, with_loss=retention.best > 0) for path in whole_checkpoints(folder)]
        for path in superfluous(saved, retention):
            if not being_read(path):
                remove(path)
                gone.append(path)
    except Exception as error:
        log.warning("old checkpoints in %s could not be removed: %s: %s", folder, type(error).__name__, error)
    return gone


def remove(checkpoint: Path) -> None:
    """Rename to step_N.old, which readers ignore, then delete: a killed process leaves no partly deleted step_N. For a
    symbolic link, delete the link and keep its target."""
    aside = checkpoint.with_suffix(".old")
    discard(aside)
    discard(checkpoint.rename(aside))


def discard(path: Path) -> None:
    """Delete a folder, a file or a symbolic link, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Holds a shared file lock, so that no run's retention removes the checkpoint (on file systems with locks)."""
    with (checkpoint / MANIFEST).open("rb") as file:
        with contextlib.suppress(OSError):  # the file system has no file locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def being_read(checkpoint: Path) -> bool:
    """Whether some process is within `reading(checkpoint)`."""
    try:
        with (checkpoint / MANIFEST).open("r+b") as file:  # NFS: exclusive locks need a file open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no file locks, or a read-only one
        return False
    return False


def _describe(path: Path, *, with_loss: bool) -> Saved:
    step = step_of(path)
    if not with_loss:
        return Saved(path, step)
    try:
        held_out = json.loads((path / MANIFEST).read_text())["training"].get("held_out") or {}
        return Saved(path, step, held_out.get("heldout_loss") if held_out.get("step") == step else None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged: no save fails for it
        return Saved(path, step)
