"""The checkpoint that a run goes on from: chosen once, by rank 0, and sent to all ranks.

Ranks that looked for themselves could start at different steps: a network file system may show one host a folder as it
was seconds ago. A rank that cannot see the chosen checkpoint as rank 0 does ends the run with one line, on all ranks.
"""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tn.checkpoint.manifest import MANIFEST, Manifest, step_of
from megatron_tn.checkpoint.verify import whole_from
from megatron_tn.config import ConfigError, TrainConfig, differences, to_mapping
from megatron_tn.training.run_folder import RunFolder, find_checkpoint
from megatron_tn.training.state import Ledger

log = logging.getLogger(__name__)

SHOWN = 4  # ranks that a message names


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    checkpoint: None for initial values. weights: the folder of init_from that they are read from instead, for a run
    that has no checkpoint yet. manifest_sha256: of its manifest, "" for initial values. by_hand: whether a
    person named the checkpoint, or asked for none. later: checkpoints of run_dir past it, which this start leaves
    behind. damage: checkpoint -> what is wrong with it, for those among `later` that were passed over because of it.
    ledger: what was noted after the checkpoint was saved; empty where a person chose another past.
    """

    checkpoint: Path | None = None
    manifest_sha256: str = ""
    by_hand: bool = False
    later: tuple[Path, ...] = ()
    damage: dict[Path, list[str]] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    weights: Path | None = field(default=None, compare=False)

    def manifest(self) -> Manifest | None:
        return None if self.checkpoint is None else Manifest.read(self.checkpoint)


def choose_start(config: TrainConfig, folder: RunFolder, *, requeued: bool) -> Start:
    """The start that checkpoint.resume asks for, by what this process sees. Called on rank 0.

    requeued: whether SLURM starts this job again: it goes on from its newest checkpoint, whatever its first start was
    asked, unless there is none yet.

    Raises:
        ConfigError: one was asked for by name and is not there, or a fresh start would mix with an earlier run's files,
            or there are checkpoints and all are damaged.
    """
    asked = str(config.checkpoint.resume)
    there = folder.whole_checkpoints()
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
        raise ConfigError(f"checkpoint.resume={asked} does not exist; run_dir={config.run_dir} has steps: {steps}")
    try:
        step = Manifest.read(checkpoint).step
    except ConfigError as error:
        raise ConfigError(f"checkpoint.resume={asked}: {error}") from None
    later = tuple(path for path in there if step_of(path) > step)
    return Start(checkpoint, _sha256_of_manifest(checkpoint), by_hand=True, later=later)


def newest_start(folder: RunFolder) -> Start:
    """The newest whole checkpoint of a run, or its beginning where it has none. Called on rank 0.

    Raises:
        ConfigError: there are checkpoints, and none is whole: to start afresh is then for a person to decide.
    """
    checkpoint, damage = whole_from(folder.checkpoints)
    if checkpoint is None and damage:
        problems = chain.from_iterable(damage.values())
        where = f"no checkpoint in {folder.checkpoints} is whole; move them away to start afresh"
        raise ConfigError([*problems, where])
    later = tuple(sorted(damage))
    sha256 = _sha256_of_manifest(checkpoint) if checkpoint else ""
    return Start(checkpoint, sha256, later=later, damage=damage, ledger=folder.ledger())


def agree_on(start: Start | None, problems: Sequence[str] = ()) -> Start:
    """Rank 0's start, on all ranks, once every rank sees the checkpoint as rank 0 does. Collective.

    start, problems: rank 0's choice, or why it has none; ignored on the others.

    Raises:
        ConfigError: on all ranks: rank 0 has none, or some rank does not see it.
    """
    sent, problems = _send((start, list(problems)))
    if problems:
        raise ConfigError(problems)
    if unlike := _everywhere(_what_is_unlike(sent)):
        raise ConfigError(
            f"checkpoint {sent.checkpoint}, which rank 0 chose, is not the same to all ranks: {unlike}; "
            "their view of the file system is stale, or run_dir is not on a shared one: start again when all see it"
        )
    return sent


def agree_on_settings(config: TrainConfig) -> None:
    """Raises ConfigError, on all ranks, where some rank would run other settings than rank 0. Collective."""
    mine, wanted = to_mapping(config), _send(to_mapping(config))
    if unlike := _everywhere("" if mine == wanted else f"{_name()}: {', '.join(differences(wanted, mine))}"):
        raise ConfigError(
            f"ranks have other settings than rank 0: {unlike}; they read another run_dir/config.json, or were started "
            "with other words"
        )


def leave_later_behind(folder: RunFolder, start: Start, resume: int | str) -> None:
    """Rename checkpoints past the start, so that no later start takes them for the newest, and say under which names
    they stay. Called on rank 0."""
    for path, problems in start.damage.items():
        aside = folder.keep_aside(path, "damaged")
        log.error("a damaged checkpoint was left out, and is kept as %s: %s", aside, "; ".join(problems))
    kept = [folder.keep_aside(path, "rewound") for path in start.later if path not in start.damage]
    if kept:
        log.warning(
            "checkpoint.resume=%s goes back; later checkpoints are kept until you remove them, and another run_dir can "
            "go on from one of them with checkpoint.resume=PATH:\n%s",
            resume,
            "\n".join(f"  {path}" for path in kept),
        )


def _what_is_unlike(start: Start) -> str:
    if start.checkpoint is None:
        lost = start.weights is not None and not start.weights.is_dir()
        return f"{_name()} sees no init_from={start.weights}" if lost else ""
    try:
        same = _sha256_of_manifest(start.checkpoint) == start.manifest_sha256
    except OSError as error:
        return f"{_name()} cannot read its {MANIFEST} ({error.strerror})"
    return "" if same else f"{_name()} sees another {MANIFEST} in it"


def _name() -> str:
    return f"rank {dist.get_rank()} (host {socket.gethostname()})"


def _sha256_of_manifest(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def _send(value: Any) -> Any:
    """Rank 0's value. Collective."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _everywhere(problem: str) -> str:
    """The first few ranks' problems, in one line; empty when no rank has one. Collective."""
    problems = [problem] * dist.get_world_size()
    if len(problems) > 1:
        dist.all_gather_object(problems, problem)
    found = [one for one in problems if one]
    more = [f"and {len(found) - SHOWN} ranks more"] if len(found) > SHOWN else []
    return "; ".join(found[:SHOWN] + more)
