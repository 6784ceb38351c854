"""Write a checkpoint: every rank its own file, the manifest last, then one rename. Whole or absent, never between."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_tn.checkpoint.manifest import (
    KINDS,
    MANIFEST,
    Manifest,
    Piece,
    Trainable,
    checkpoint_name,
    whole_checkpoints,
)
from megatron_tn.checkpoint.reshard import pieces_of_local_range


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched."""


def save_checkpoint(
    engine: Trainable,
    folder: Path,
    *,
    step: int,
    optimizer_step: int,
    config: dict[str, Any],
    training: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Save masters, moments and training state as `folder`/step_NNNNNNNN. Collective over all ranks.

    keep: how many of the newest whole checkpoints stay; 0 keeps all. Older ones go only after the new one is whole.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    context = engine.context
    final = folder / checkpoint_name(step)
    partial = final.with_suffix(".tmp")

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def write() -> None:
        tensors, pieces = _owned_tensors(engine)
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        file = partial / rank_file(context.rank)
        save_file(tensors, file, metadata={"pieces": json.dumps(pieces)})
        readable_like(partial, file)
        _fsync(file)

    def publish() -> None:
        manifest = Manifest(
            step=step,
            optimizer_step=optimizer_step,
            config=config,
            layout={"dp": context.dp.size, "cp": context.cp.size, "tp": context.tp.size},
            shapes={name: list(spec.shape) for name, spec in engine.model.shard_specs().items()},
            training=training,
            padded_vocab=engine.model.shard_specs()["model.embed_tokens.weight"].padded,
        )
        for rank in range(context.world_size):
            with safe_open(partial / rank_file(rank), framework="pt") as stored:
                for name, items in json.loads(stored.metadata()["pieces"]).items():
                    manifest.pieces.setdefault(name, []).extend(Piece(**item) for item in items)
        path = partial / MANIFEST
        path.write_text(manifest.to_json())
        _fsync(path)
        _fsync(partial)
        if final.exists():  # an earlier save of the same step, after a rewind
            shutil.rmtree(final)
        partial.rename(final)
        _fsync(folder)
        for old in whole_checkpoints(folder)[:-keep] if keep else []:
            shutil.rmtree(old)

    for action, everyone in ((prepare, False), (write, True), (publish, False)):
        _together(action if everyone or context.is_first else None, partial)
    return final


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _owned_tensors(engine: Trainable) -> tuple[dict[str, torch.Tensor], dict[str, list[dict]]]:
    """What this rank writes: key -> fp32 [n] on the CPU, and kind/NAME -> pieces. Repeated values are written once."""
    context, specs = engine.context, engine.model.shard_specs()
    tensors: dict[str, torch.Tensor] = {}
    pieces: dict[str, list[dict]] = {}
    if not engine.partitioned and context.data.rank > 0:
        return tensors, pieces
    for owned in engine.owned_ranges():
        spec = specs[owned.name]
        if spec.replicated and context.tp.rank > 0:
            continue
        located = list(pieces_of_local_range(spec, context.tp.rank, context.tp.size, owned.start, owned.stop))
        for kind in KINDS:
            for piece, at in located:
                name = f"{kind}/{owned.name}"
                key = f"{name}/{len(pieces.setdefault(name, []))}"
                values = owned.values[kind][at : at + piece.stop - piece.start]
                tensors[key] = values.detach().to("cpu", torch.float32, copy=True)
                pieces[name].append(asdict(Piece(piece.box, piece.start, piece.stop, rank_file(context.rank), key)))
    return tensors, pieces


def _together(action, path: Path) -> None:
    """Run `action` where there is one, and let every rank learn whether it went well anywhere."""
    error: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as caught:
        error = caught
    failed = torch.tensor(float(error is not None))
    if dist.is_initialized():
        failed = failed.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(failed)
    if failed.item():
        reason = f"{type(error).__name__}: {error}" if error else "another rank failed"
        raise CheckpointError(f"checkpoint {path} could not be written: {reason}") from error


def readable_like(folder: Path, file: Path) -> None:
    """safetensors makes files that their owner alone can read; colleagues may read what they can read of the folder."""
    file.chmod(folder.stat().st_mode & 0o666)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
