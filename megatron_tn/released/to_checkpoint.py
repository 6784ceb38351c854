"""Weights as a checkpoint of step 0: a run begins with them, a fresh optimizer and data from the beginning."""

import contextlib
import math
import shutil
from pathlib import Path

import torch

from megatron_tn.checkpoint.files import stream_tensors, sync_folder
from megatron_tn.checkpoint.load import Weights
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, Piece, checkpoint_name, rank_file
from megatron_tn.config import ConfigError, DataConfig, EngineConfig, TrainConfig, to_stored
from megatron_tn.released.write import whole_tensor


def write_checkpoint(weights: Weights, folder: Path, precision: str, sequence_length: int | None = None) -> Path:
    """Write `weights` to `folder`/step_00000000, one tensor after the other. Any layout and engine can resume from it.

    precision: engine.precision that the checkpoint says it was trained in, "bf16" or "fp32". sequence_length:
    data.sequence_length that it says it was trained with, where that is known. Returns the checkpoint.

    Raises:
        ConfigError: the checkpoint is there already.
    """
    final = folder / checkpoint_name(0)
    if final.exists():
        raise ConfigError(f"{final} is there already: name another folder")
    partial = final.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(weights, partial, precision, sequence_length)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # a run's folder without a checkpoint would be in the way of the next try
            folder.rmdir()
        raise
    sync_folder(folder)
    return final


def _write(weights: Weights, partial: Path, precision: str, sequence_length: int | None) -> None:
    """The checkpoint's file and, last, its manifest."""
    data = DataConfig() if sequence_length is None else DataConfig(sequence_length=sequence_length)
    config = TrainConfig(model=weights.config, engine=EngineConfig(precision=precision), data=data)
    file = rank_file(0)
    keys = {name: f"param/{name}/0" for name in weights.shapes}
    entries = {keys[name]: (torch.float32, (math.prod(shape),)) for name, shape in weights.shapes.items()}
    tensors = (whole_tensor(weights, name, torch.float32) for name in weights.shapes)
    record = stream_tensors(partial / file, entries, tensors)
    manifest = CheckpointManifest(
        step=0,
        optimizer_step=0,
        config=to_stored(config),
        layout={"dp": 1, "cp": 1, "tp": 1},
        shapes={name: list(shape) for name, shape in weights.shapes.items()},
        pieces={
            f"param/{name}": [Piece(tuple((0, length) for length in shape), 0, math.prod(shape), file, keys[name])]
            for name, shape in weights.shapes.items()
        },
        files={file: record},
        padded_vocab=weights.shapes["model.embed_tokens.weight"][0],
        state_kinds=[],  # no optimizer state
    )
    (partial / MANIFEST).write_text(manifest.to_json())
    sync_folder(partial)
