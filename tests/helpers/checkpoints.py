"""Checkpoints without a run: saved at once, and loaded as a model."""

from pathlib import Path
from typing import Any

from megatron_tn.checkpoint.manifest import Trainable
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.checkpoint.save import take_snapshot, write_snapshot
from megatron_tn.loading import load_any_model
from megatron_tn.model.base import Model


def save_checkpoint(engine: Trainable, folder: Path, *, retention: Retention | None = None, **content: Any) -> Path:
    """The checkpoint, written in this thread and without a copy. content: of `take_snapshot`. Collective."""
    return write_snapshot(take_snapshot(engine, folder, **content), retention)


def load_model(checkpoint: Path) -> Model:
    """The checkpoint's model on the CPU, in the precision that it was trained in."""
    return load_any_model(str(checkpoint), "cpu", "trained")
