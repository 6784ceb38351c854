"""Choose the checkpoint that a run resumes from: rank 0 chooses and broadcasts.

If each rank chose, ranks could start at different steps, because network file systems cache folder listings for
seconds. If any rank does not see the chosen checkpoint with rank 0's manifest, all ranks end with one line.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tn.checkpoint.ahead import ReadAhead
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, named_checkpoints, step_of
from megatron_tn.checkpoint.shares import everyones_problems, gathered
from megatron_tn.checkpoint.verify import whole_from
from megatron_tn.config import ConfigError, TrainConfig, differences, to_mapping
from megatron_tn.parallel.world import first_for_all
from megatron_tn.training.run_folder import RunFolder, find_checkpoint
from megatron_tn.training.state import Ledger

log = logging.getLogger(__name__)

SHOWN = 4  # at most so many ranks are named in a message
FINGERPRINTED = 1 << 16  # bytes at a manifest's end


@dataclass(frozen=True)
class Start:
    """Where a run begins or resumes.

    checkpoint: None for initial values. weights: the folder of init_from that they are read from instead, for a run
    that has no checkpoint yet. fingerprint: of the checkpoint's manifest; "" for initial values. weights_fingerprint:
    the same of `weights`; "" where these are no checkpoint. by_hand: whether checkpoint.resume named a checkpoint, or
    "none". later: newer checkpoints in run_dir, to be renamed. damage: checkpoint -> problems, for those of `later`
    that are damaged. ledger: notes since the checkpoint was saved; empty where `by_hand`. manifest: the checkpoint's,
    without pieces and files.
    """

    checkpoint: Path | None = None
    fingerprint: str = ""
    by_hand: bool = False
    later: tuple[Path, ...] = ()
    damage: dict[Path, list[str]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    weights: Path | None = field(default=None, compare=False)
    weights_fingerprint: str = field(default="", compare=False)
    manifest: CheckpointManifest | None = field(default=None, compare=False)

    @classmethod
    def at(cls, checkpoint: Path, **more: Any) -> Start:
        """Raises ConfigError: its manifest is absent or damaged."""
        manifest = CheckpointManifest.read(checkpoint).without_pieces()
        return cls(checkpoint, _fingerprint(checkpoint), manifest=manifest, **more)

    def with_weights(self, folder: Path) -> Start:
        """This start, with initial weights from `folder`: a checkpoint, or in the released layout."""
        ours = (folder / MANIFEST).is_file()
        return replace(self, weights=folder, weights_fingerprint=_fingerprint(folder) if ours else "")


def choose_start(config: TrainConfig, folder: RunFolder, *, requeued: bool) -> Start:
    """The start of checkpoint.resume. Called on rank 0.

    requeued: whether SLURM restarted this job: it then resumes from its newest checkpoint, if any, and
    checkpoint.resume is ignored.

    Raises:
        ConfigError: the named checkpoint does not exist; a fresh start would mix with an earlier run's files; or all
            checkpoints are damaged.
    """
    asked = str(config.checkpoint.resume)
    there = named_checkpoints(folder.checkpoints)
    if asked == "auto" or (requeued and there):
        return newest_start(folder)
    if asked == "none":
        if there:
            raise ConfigError(
                f"checkpoint.resume=none, but run_dir={config.run_dir} already holds {there[-1].name}; choose another "
                "run_dir, or resume with checkpoint.resume=auto"
            )
        return Start(by_hand=True)
    checkpoint = folder.saved().get(int(asked)) if asked.isdecimal() else find_checkpoint(Path(asked)) or Path(asked)
    if not asked.strip() or checkpoint is None or not checkpoint.is_dir():
        steps = ", ".join(map(str, folder.saved())) or "none"
        why = "is a file, not a checkpoint's folder" if checkpoint and checkpoint.is_file() else "does not exist"
        raise ConfigError(f"checkpoint.resume={asked} {why}; run_dir={config.run_dir} has steps: {steps}")
    try:
        start = Start.at(checkpoint, by_hand=True)
    except ConfigError as error:
        raise ConfigError(f"checkpoint.resume={asked}: {error}") from None
    return replace(start, later=tuple(path for path in there if step_of(path) > start.manifest.step))


def newest_start(folder: RunFolder, known: Mapping[Path, list[str]] | None = None) -> Start:
    """The newest undamaged checkpoint of a run, or step 0 where it has no checkpoints. Called on rank 0.

    known: checkpoint -> damage that only reading all of it has shown.

    Raises:
        ConfigError: all checkpoints are damaged; the user must decide whether to start afresh.
    """
    checkpoint, damage = whole_from(folder.checkpoints, known)
    if checkpoint is None and damage:
        problems = chain.from_iterable(damage.values())
        where = f"all checkpoints in {folder.checkpoints} are damaged; move them away to start afresh"
        raise ConfigError([*problems, where])
    found = {"later": tuple(sorted(damage)), "damage": damage, "ledger": folder.ledger()}
    return Start.at(checkpoint, **found) if checkpoint else Start(**found)


def agree_on(choose: Callable[[], Start]) -> Start:
    """`choose()` on rank 0, sent to all, and checked: every rank reads the same manifest. Collective.

    Raises:
        Exception: on all ranks: what `choose` raised.
        ConfigError: on all ranks: some rank does not see the checkpoint.
    """
    sent = first_for_all(choose)
    if unlike := _everywhere(_what_is_unlike(sent)):
        raise ConfigError(
            f"checkpoint {sent.checkpoint or sent.weights}, which rank 0 chose, is not the same to all ranks: "
            f"{unlike}; their view of the file system is stale, or run_dir is not on a shared one: start again when "
            "all see it"
        )
    return sent


def verified(start: Start, folder: RunFolder, ahead: ReadAhead, resume: int | str) -> Start:
    """`start` or, where bytes of its checkpoint are not those that were saved, the newest older one whose are.
    Collective: the ranks share the reading, which `ahead` may have begun. resume: the setting checkpoint.resume.

    Raises:
        ConfigError: on all ranks: a checkpoint chosen by hand, or every checkpoint, is damaged.
    """
    while start.checkpoint is not None:
        damage = everyones_problems(ahead.problems(start.checkpoint), ahead.rank, ahead.size)
        if not damage:
            break
        if start.by_hand:
            raise ConfigError(named(start, resume, damage))
        start = agree_on(partial(newest_start, folder, start.damage | {start.checkpoint: damage}))
    return start


def named(start: Start, resume: int | str, problems: Iterable[str]) -> list[str]:
    """Problems of the start's checkpoint, behind the setting checkpoint.resume where that chose it."""
    return [f"checkpoint.resume={resume}: {problem}" if start.by_hand else problem for problem in problems]


def agree_on_settings(config: TrainConfig) -> None:
    """Raises ConfigError on all ranks if any rank's settings differ from rank 0's. Collective."""
    mine, wanted = to_mapping(config), first_for_all(lambda: to_mapping(config))
    if unlike := _everywhere("" if mine == wanted else f"{_name()}: {', '.join(differences(wanted, mine))}"):
        raise ConfigError(
            f"ranks have other settings than rank 0: {unlike}; they have other command line overrides, or other files "
            "in conf/"
        )


def agree_on_files(files: Mapping[str, str]) -> None:
    """files: setting -> path of a file that rank 0 has read for all. Raises ConfigError on all ranks if some rank does
    not see one: it would train on padding instead of the data. Collective."""
    lost = [f"{setting}={path}" for setting, path in files.items() if not os.path.isfile(path)]
    if blind := _everywhere(f"{_name()} sees no {', '.join(lost)}" if lost else ""):
        raise ConfigError(f"ranks do not see what rank 0 has read: {blind}; is it on a shared file system?")


def leave_later_behind(folder: RunFolder, start: Start, resume: int | str) -> None:
    """Rename the checkpoints newer than the start's, so that no later start resumes from them, and log their new names.
    Called on rank 0."""
    for path, problems in start.damage.items():
        aside = folder.keep_aside(path, "damaged")
        log.error("damaged checkpoint skipped and renamed to %s: %s", aside, "; ".join(problems))
    kept = [folder.keep_aside(path, "rewound") for path in start.later if path not in start.damage]
    if kept:
        log.warning(
            "checkpoint.resume=%s is not the newest checkpoint; later ones are kept under other names until you remove "
            "them (to continue from one in another run_dir: checkpoint.resume=PATH):\n%s",
            resume,
            "\n".join(f"  {path}" for path in kept),
        )


def _what_is_unlike(start: Start) -> str:
    checkpoint, wanted = start.checkpoint or start.weights, start.fingerprint or start.weights_fingerprint
    if not wanted:
        lost = checkpoint is not None and not os.path.isdir(checkpoint)
        return f"{_name()} sees no init_from={checkpoint}" if lost else ""
    try:
        same = _fingerprint(checkpoint) == wanted
    except OSError as error:
        return f"{_name()} cannot read its {MANIFEST} ({error.strerror})"
    return "" if same else f"{_name()} sees another {MANIFEST} in it"


def _name() -> str:
    return f"rank {dist.get_rank()} (host {socket.gethostname()})"


def _fingerprint(checkpoint: Path) -> str:
    """Size and sha256 of the end of the manifest, where digests of the files are: of 512 ranks it is 100 MB long."""
    with (checkpoint / MANIFEST).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - FINGERPRINTED, 0))
        return f"{size}/{hashlib.sha256(file.read()).hexdigest()}"


def _everywhere(problem: str) -> str:
    """All ranks' problems, those of the first SHOWN ranks spelled out, in one line; empty without any. Collective."""
    found = [one for one in gathered(problem, dist.get_rank(), dist.get_world_size()) if one]
    more = [f"and {len(found) - SHOWN} ranks more"] if len(found) > SHOWN else []
    return first_for_all(lambda: "; ".join(found[:SHOWN] + more))
