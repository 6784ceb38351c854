"""Write a checkpoint: every rank writes its file, rank 0 the manifest, then one rename makes the checkpoint visible.

`take_snapshot` copies this rank's tensors to host memory; then training may continue. `write_snapshot` writes the
files: `background.CheckpointWriter` calls it in a thread.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tn.checkpoint.files import FileRecord, sync_folder, write_tensors
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, Piece, Trainable, checkpoint_name, rank_file
from megatron_tn.checkpoint.reshard import pieces_of_local_range
from megatron_tn.checkpoint.retention import Retention, apply_retention, discard, remove
from megatron_tn.checkpoint.shares import gathered
from megatron_tn.device.host_memory import HostMemory

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; older checkpoints are untouched."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint.

    tensors: key -> fp32 [n] or uint8 [n], views of host memory or of the engine's tensors. manifest: lacks the other
    ranks' pieces and files.
    """

    folder: Path
    rank: int
    world_size: int
    tensors: dict[str, Tensor]
    manifest: CheckpointManifest


@torch.no_grad()
def take_snapshot(
    engine: Trainable,
    folder: Path,
    *,
    step: int,
    optimizer_step: int,
    config: dict[str, Any],
    training: dict[str, Any],
    memory: HostMemory | None = None,
) -> Snapshot:
    """Copy the tensors that this rank writes to `memory`; the engine may then change. Not collective.

    memory: the snapshot before in it must have been written. None: the snapshot has the engine's own tensors, which may
    not change until it is written.
    """
    context, specs = engine.context, engine.model.shard_specs()
    sources, pieces = _written_here(engine)
    manifest = CheckpointManifest(
        step=step,
        optimizer_step=optimizer_step,
        config=config,
        layout={"dp": context.dp.size, "cp": context.cp.size, "tp": context.tp.size},
        shapes={name: list(spec.shape) for name, spec in specs.items()},
        pieces=pieces,
        training=training,
        padded_vocab=specs["model.embed_tokens.weight"].padded,
        state_kinds=list(engine.state_kinds),
    )
    tensors = {key: source.detach() for key, source in sources.items()}
    if memory is not None:
        parts = memory.take(*_host_memory(sources)).split([source.numel() for source in sources.values()])
        for (key, source), part in zip(sources.items(), parts, strict=True):
            tensors[key] = part.copy_(source.detach(), non_blocking=True)
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
        torch.cuda.current_stream().synchronize()
    return Snapshot(folder, context.rank, context.world_size, tensors, manifest)


def prepare_host_memory(engine: Trainable, memory: HostMemory) -> None:
    """Begin to make the memory that `take_snapshot` will need: the first save then waits for the copy alone."""
    memory.prepare(*_host_memory(_written_here(engine)[0]))


def _host_memory(sources: dict[str, Tensor]) -> tuple[int, bool]:
    """Elements of a copy of `sources`, and whether its memory should be page-locked."""
    return sum(source.numel() for source in sources.values()), any(source.is_cuda for source in sources.values())


def write_snapshot(
    snapshot: Snapshot, retention: Retention | None = None, group: dist.ProcessGroup | None = None
) -> Path:
    """Write all ranks' snapshots of one step. Collective over `group`, which carries CPU tensors and spans all ranks.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    folder, first = snapshot.folder, snapshot.rank == 0
    final = folder / checkpoint_name(snapshot.manifest.step)
    partial = final.with_suffix(".tmp")

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (*folder.glob("step_*.tmp"), *folder.glob("step_*.old")):
            try:
                discard(leftover)
            except OSError as error:
                log.warning("%s, which an earlier process left, could not be removed: %s", leftover, error)
        for again in folder.glob("step_*-again"):  # left by a process that died between the two renames below
            _replace(again)
        partial.mkdir()

    def write() -> FileRecord:
        return write_tensors(partial / rank_file(snapshot.rank), snapshot.tensors)

    def publish() -> None:
        manifest = replace(snapshot.manifest, pieces={}, files={})
        for rank, (record, pieces) in enumerate(contents):
            manifest.files[rank_file(rank)] = record
            for name, items in pieces.items():
                manifest.pieces.setdefault(name, []).extend(items)
        for name in manifest.shapes:
            kinds = [kind for kind in manifest.state_kinds if f"{kind}/{name}" in manifest.pieces]
            if kinds != manifest.state_kinds:
                manifest.own_kinds[name] = kinds
        with (partial / MANIFEST).open("w") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        if not os.path.lexists(final):
            partial.rename(final)
        else:  # step_N exists: at every moment step_N or step_N-again is a complete checkpoint that readers find
            _replace(partial.rename(final.with_name(f"{final.name}-again")))
        sync_folder(folder)

    try:
        _together(prepare if first else None, snapshot, group)
        record = _together(write, snapshot, group)
        contents = gathered((record, snapshot.manifest.pieces), snapshot.rank, snapshot.world_size, group)
        _together(publish if first else None, snapshot, group)
    except CheckpointError as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk
        raise CheckpointError(f"checkpoint {final} could not be written: {error}") from None
    if first and retention is not None:
        apply_retention(folder, retention)
    return final


def _replace(again: Path) -> None:
    """Rename step_N-again, a second save of step N, to step_N, and delete the first save."""
    final = again.with_name(again.name.removesuffix("-again"))
    if os.path.lexists(final):
        remove(final)
    again.rename(final)


def _written_here(engine: Trainable) -> tuple[dict[str, Tensor], dict[str, list[Piece]]]:
    """What this rank writes: key -> tensor [n] of the engine, and kind/NAME -> pieces. The first of several ranks with
    the same range writes it."""
    context, specs = engine.context, engine.model.shard_specs()
    sources: dict[str, Tensor] = {}
    pieces: dict[str, list[Piece]] = {}
    if not engine.partitioned and context.data.rank > 0:
        return sources, pieces
    file = rank_file(context.rank)
    for owned in engine.owned_ranges():
        if (spec := specs[owned.name]).replicated and context.tp.rank > 0:
            continue
        located = list(pieces_of_local_range(spec, context.tp.rank, context.tp.size, owned.start, owned.stop))
        for kind in owned.values:
            here = pieces.setdefault(f"{kind}/{owned.name}", [])
            for piece, at in located:
                key = f"{kind}/{owned.name}/{len(here)}"
                sources[key] = owned.values[kind][at : at + piece.stop - piece.start]
                here.append(replace(piece, file=file, key=key))
    return sources, pieces


def _together(action: Callable[[], Any] | None, snapshot: Snapshot, group: dist.ProcessGroup | None) -> Any:
    """Run `action` where it is not None and wait for all ranks. Returns this rank's result; raises CheckpointError on
    every rank when one failed."""
    result, failure = None, ""
    try:
        if action is not None:
            result = action()
    except Exception as caught:
        failure = f"rank {snapshot.rank}: {type(caught).__name__}: {caught}"
    failures = ["; ".join(filter(None, gathered(failure, snapshot.rank, snapshot.world_size, group)))]
    if snapshot.world_size > 1:
        dist.broadcast_object_list(failures, src=0, group=group)
    if failures[0]:
        raise CheckpointError(failures[0])
    return result
