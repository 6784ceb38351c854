"""Which checkpoints stay. A new one is whole before an old one goes, and one that somebody reads is left alone."""

from __future__ import annotations

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
    """A checkpoint stays when any of these holds.

    newest: it is one of so many newest ones; 0 keeps all. every: its step is a multiple of this; 0: none is kept for
    that. best: it is one of so many with the lowest held-out loss, of those that were evaluated at their own step.
    """

    newest: int = 0
    every: int = 0
    best: int = 0


class Saved(NamedTuple):
    """A whole checkpoint, its step, and the held-out loss measured at that step (None: it was not)."""

    path: Path
    step: int
    loss: float | None = None


def superfluous(saved: Sequence[Saved], retention: Retention) -> list[Path]:
    """Those that nothing keeps, oldest first. The newest always stays."""
    if retention.newest == 0:
        return []
    by_age = sorted(saved, key=lambda one: one.step)
    kept = {one.path for one in by_age[-max(retention.newest, 1) :]}
    if retention.every:
        kept |= {one.path for one in by_age if one.step % retention.every == 0}
    # NaN is neither above nor below a number, and would leave the others unsorted.
    evaluated = [one for one in by_age if one.loss is not None and not math.isnan(one.loss)]
    evaluated.sort(key=lambda one: one.loss)
    kept |= {one.path for one in evaluated[: retention.best]}
    return [one.path for one in by_age if one.path not in kept]


def apply_retention(folder: Path, retention: Retention) -> list[Path]:
    """Remove what nothing keeps from `folder`; returns what went. Called after a save, on one rank.

    Never raises: what cannot be removed is named in a warning, and the next save tries again.
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
    """Rename to step_N.old first, which no reader looks for: a process that dies half way leaves nothing that looks
    whole. Of a symbolic link the link goes, and its target stays."""
    aside = checkpoint.with_suffix(".old")
    discard(aside)
    discard(checkpoint.rename(aside))


def discard(path: Path) -> None:
    """Remove a folder, a file or a symbolic link, or nothing where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Until the block ends, no run removes this checkpoint (on file systems that have locks)."""
    with (checkpoint / MANIFEST).open("rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def being_read(checkpoint: Path) -> bool:
    """Whether some process is within `reading(checkpoint)`."""
    try:
        with (checkpoint / MANIFEST).open("r+b") as file:  # NFS locks exclusively only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here, or a link to a disk that is read-only
        return False
    return False


def _describe(path: Path, *, with_loss: bool) -> Saved:
    step = step_of(path)
    if not with_loss:
        return Saved(path, step)
    held_out = json.loads((path / MANIFEST).read_text())["training"].get("held_out") or {}
    return Saved(path, step, held_out.get("heldout_loss") if held_out.get("step") == step else None)
