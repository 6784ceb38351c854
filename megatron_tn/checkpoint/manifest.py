"""The checkpoint format: a folder of safetensors files and a JSON manifest. No pickle is ever written or read.

    step_00000500/
      manifest.json              what is here, with every file's size and sha256; written last, so that it means "whole"
      rank_00000.safetensors     fp32 masters and moments that rank 0 owned, and its RNG state
      ...

Every tensor has its logical (released) name under its kind: param/NAME, and for AdamW exp_avg/NAME and exp_avg_sq/NAME;
the manifest's state_kinds says which kinds the optimizer keeps. A piece is an
element range of a box of the logical tensor, flattened in row-major order: the box says which slice a tensor-parallel
rank held, the range which part of that slice a ZeRO rank owned. Padding is in no box, so it is never saved.

Beside whole checkpoints a folder may hold, and no reader looks for:
  step_N.tmp             being written, or cut short; the next save removes it
  step_N.old             being removed, or cut short in that; the next save removes it
  step_N.damaged-TIME    passed over by a start because of damage; stays for a person to look at
  step_N.rewound-TIME    left behind by checkpoint.resume=STEP; stays until a person removes it or goes on from it
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from megatron_tn.checkpoint.files import FileRecord
from megatron_tn.config import ConfigError
from megatron_tn.model.base import Model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import Box, OwnedRange

FORMAT = "megatron_tn checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
MOMENTS = ["exp_avg", "exp_avg_sq"]  # what every optimizer kept before manifests said so
SECTIONS = ("model", "engine", "data")  # of the config, which readers of a checkpoint look into
NAME = re.compile(r"step_\d{8,}(-again)?")  # see save.publish for -again


class Trainable(Protocol):
    """What a checkpoint needs of an engine; see `engine.base.Engine` for the meaning of each."""

    model: Model
    context: ParallelContext
    partitioned: bool

    @property
    def state_kinds(self) -> tuple[str, ...]: ...

    def owned_ranges(self) -> list[OwnedRange]: ...

    def refresh(self, optimizer_step: int) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of `box` of a logical tensor, flattened; in `file` under `key`, fp32 [stop - start]."""

    box: Box
    start: int
    stop: int
    file: str = ""
    key: str = ""


@dataclass
class CheckpointManifest:
    """step: optimizer steps done, optimizer_step: those that were applied. training: what the loop needs to go on
    (tokens, data position, ...). state_kinds: what the optimizer keeps of each parameter, as its `state_kinds`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: NonNegativeInt
    optimizer_step: NonNegativeInt
    config: dict[str, Any]
    layout: dict[str, PositiveInt]
    shapes: dict[str, list[PositiveInt]]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)  # kind/NAME -> pieces
    files: dict[str, FileRecord] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    padded_vocab: int = 0
    state_kinds: list[str] = field(default_factory=MOMENTS.copy)

    @property
    def kinds(self) -> list[str]:
        """The tensors kept of each parameter: its fp32 master, and what the optimizer adds."""
        return ["param", *self.state_kinds]

    def to_json(self) -> str:
        values = asdict(self)
        values["pieces"] = {name: [asdict(piece) for piece in pieces] for name, pieces in self.pieces.items()}
        return json.dumps({"format": FORMAT, "version": VERSION} | values)

    @classmethod
    def read(cls, directory: Path) -> CheckpointManifest:
        """Read and check the manifest of the checkpoint in `directory`.

        Raises:
            ConfigError: it is absent, not JSON, of another format or version, or names a file outside its folder.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise ConfigError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
        try:
            values = json.loads(path.read_text())
            found = values.pop("format", None), values.pop("version", None)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged: {error}") from None
        if found != (FORMAT, VERSION):
            raise ConfigError(f"{path}: format and version are {found}, expected {(FORMAT, VERSION)}")
        try:
            manifest = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            places = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ConfigError(f"{path} is damaged: {places[0]}") from None
        for section in SECTIONS:
            if not isinstance(manifest.config.get(section), dict):
                raise ConfigError(f"{path} is damaged: its config has no {section}")
        named = {piece.file for pieces in manifest.pieces.values() for piece in pieces} | manifest.files.keys()
        for file in sorted(named):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ConfigError(f"{path}: {file!r} is not a safetensors file in its own folder")
        return manifest


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_").partition("-")[0])


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first. One that was being written when its process died has no manifest; one
    with a name of somebody's own, such as step_00000500_copy, is left alone."""
    found = (path for path in folder.glob("step_*") if NAME.fullmatch(path.name))
    whole = (path for path in found if (path / MANIFEST).is_file())
    return sorted(whole, key=lambda path: (step_of(path), path.name))
