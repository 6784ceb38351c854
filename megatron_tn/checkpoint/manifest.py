"""The checkpoint format: a folder of safetensors files and a JSON manifest. No pickle is ever written or read.

    step_00000500/
      manifest.json              tensors, and every file's size and sha256; written last: its presence means "complete"
      rank_00000.safetensors     fp32 masters and moments that rank 0 owned, and its RNG state
      ...

Every tensor has its logical (released) name under its kind: param/NAME, and for AdamW exp_avg/NAME and exp_avg_sq/NAME;
the manifest's state_kinds lists the optimizer's kinds, own_kinds those of a parameter that has only some of them. A
piece is an element range of a box of the logical tensor, flattened in row-major order: the box is the slice of a
tensor-parallel rank, the range the part of that slice that a ZeRO rank owned. Padding is in no box, so it is never
saved.

Readers ignore these folders beside complete checkpoints:
  step_N.tmp             a save in progress or interrupted; the next save removes it
  step_N.old             a removal in progress or interrupted; the next save removes it
  step_N.damaged-TIME    found damaged when a run resumed; kept for inspection
  step_N.rewound-TIME    newer than the step of checkpoint.resume=STEP; kept until a person removes or resumes it
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from megatron_tn.checkpoint.parts import FileRecord
from megatron_tn.config import ConfigError
from megatron_tn.model.base import Model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import Box, OwnedRange

FORMAT = "megatron_tn checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
MOMENTS = ["exp_avg", "exp_avg_sq"]  # default for older manifests without state_kinds
SECTIONS = ("model", "engine", "data")  # sections of the run's config that readers of a checkpoint use
SNIFFED = 256  # bytes of a manifest's beginning that name its format
NAME = re.compile(r"step_\d{8,}(-again)?")  # see save.publish for -again


class Trainable(Protocol):
    """The part of `engine.base.Engine` that saving and loading use; see there for the members."""

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
    """step: training steps done. optimizer_step: steps whose update was applied. training: state of the training loop
    (tokens, data position, ...). state_kinds: the optimizer's `state_kinds`, such as exp_avg. own_kinds: parameter ->
    its state kinds, where they are not all of state_kinds."""

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
    own_kinds: dict[str, list[str]] = field(default_factory=dict)

    def kinds(self, name: str) -> list[str]:
        """Kinds of tensor of parameter `name`: "param" (the fp32 master) and its optimizer state."""
        return ["param", *self.own_kinds.get(name, self.state_kinds)]

    def to_json(self) -> str:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["pieces"] = {name: list(map(vars, pieces)) for name, pieces in self.pieces.items()}
        values["files"] = {name: vars(record) for name, record in self.files.items()}
        return json.dumps({"format": FORMAT, "version": VERSION} | values)

    def without_pieces(self) -> CheckpointManifest:
        """The manifest without pieces and files: its size does not grow with the number of ranks."""
        return replace(self, pieces={}, files={})

    @classmethod
    def read(cls, directory: Path) -> CheckpointManifest:
        """Read and check the manifest of the checkpoint in `directory`.

        Raises:
            ConfigError: the manifest is absent, not JSON, of another format or version, or names a file outside
                `directory`.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise ConfigError(f"{directory} is not a checkpoint: it has no {MANIFEST}")
        return cls._parsed(path.read_bytes(), path)

    @classmethod
    @functools.lru_cache(maxsize=1)  # a start reads one several times, and one of 512 ranks takes seconds to check
    def _parsed(cls, text: bytes, path: Path) -> CheckpointManifest:
        try:
            values = json.loads(text)
            found = values.pop("format", None), values.pop("version", None)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged: {error}") from None
        if found != (FORMAT, VERSION):
            raise ConfigError(
                f"{path}: format and version are {found}, expected {(FORMAT, VERSION)}: it is of another program"
            )
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

    @classmethod
    def forget(cls) -> None:
        """Free the manifest that was read last."""
        cls._parsed.cache_clear()


def format_of(folder: Path) -> str:
    """What the manifest.json in `folder` says that it is of, in its first bytes: FORMAT, or that of shards of training
    data; "" where it does not say."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            found = re.search(rb'"format": *"([^"]*)"', file.read(SNIFFED))
    except OSError:  # removed since it was seen
        return ""
    return found[1].decode(errors="replace") if found else ""


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_").partition("-")[0])


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def named_checkpoints(folder: Path) -> list[Path]:
    """What is named as a checkpoint (`NAME`) in `folder`, oldest first; a name such as step_00000500_copy does not
    match. A save gives the name to a folder that has its manifest: without one it is damaged, as where a copy of the
    run broke off or a symbolic link's disk is not mounted."""
    found = (path for path in folder.glob("step_*") if NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: (step_of(path), path.name))


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that have a manifest, oldest first."""
    return [path for path in named_checkpoints(folder) if (path / MANIFEST).is_file()]
