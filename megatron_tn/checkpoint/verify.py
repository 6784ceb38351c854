"""Checks a checkpoint: each file's size and sha256, and that the pieces cover every tensor element exactly once."""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from megatron_tn.checkpoint.files import TensorFile
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, Piece, named_checkpoints
from megatron_tn.checkpoint.parts import FileRecord, digest_of
from megatron_tn.checkpoint.reshard import rectangles
from megatron_tn.checkpoint.shares import by_file
from megatron_tn.config import ConfigError, TrainConfig, from_mapping
from megatron_tn.model.registry import build_model


def verify(directory: Path) -> list[str]:
    """One line per problem; empty when the checkpoint is complete. Reads every byte once."""
    try:
        manifest = CheckpointManifest.read(directory)
    except ConfigError as error:
        return error.problems
    found = _content_problems(manifest)
    for name, (record, pieces) in sorted(by_file(manifest).items()):
        found += problems_of_file(directory / name, record, pieces)
    known = {MANIFEST, *manifest.files}
    strangers = sorted(path.name for path in directory.iterdir() if path.name not in known)
    return found + [f"{directory / name} is not part of the checkpoint" for name in strangers]


def glance(directory: Path) -> list[str]:
    """Problems found without reading tensors: in the manifest, or files that are missing or of another size."""
    try:
        manifest = CheckpointManifest.read(directory)
    except ConfigError as error:
        return error.problems
    found = []
    for name, record in sorted(manifest.files.items()):
        path = directory / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != record.size:
            found.append(_wrong_size(path, record.size))
    return found


def whole_from(
    folder: Path, known: Mapping[Path, list[str]] | None = None
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint that is not in `known` (problems of checkpoints) and has no problems by `glance`, if any;
    and the problems of each newer checkpoint."""
    known, damage = known or {}, {}
    for checkpoint in reversed(named_checkpoints(folder)):
        if not (problems := known.get(checkpoint) or glance(checkpoint)):
            return checkpoint, damage
        damage[checkpoint] = problems
    return None, damage


def _content_problems(manifest: CheckpointManifest) -> list[str]:
    """Problems within the manifest, such as pieces that overlap or leave a gap; no file is read."""
    found = []
    try:
        config = from_mapping(TrainConfig, manifest.config)
        found += config.model.problems()
        if not found:
            model = build_model(config.model, None, "meta", torch.float32)
            shapes = {name: list(spec.shape) for name, spec in model.shard_specs().items()}
            for name in sorted(shapes.keys() | manifest.shapes.keys()):
                if shapes.get(name) != manifest.shapes.get(name):
                    found.append(f"{name}: shape {manifest.shapes.get(name)}, but the model has {shapes.get(name)}")
    except ConfigError as error:
        found += [f"{MANIFEST}: config: {problem}" for problem in error.problems]
    if manifest.training.get("step", manifest.step) != manifest.step:
        found.append(f"{MANIFEST}: step={manifest.step}, but training.step={manifest.training['step']}")
    ranks, files = math.prod(manifest.layout.values()), len(manifest.files)
    if ranks != files:
        found.append(f"{MANIFEST}: layout {manifest.layout} is of {ranks} ranks, but {files} files are listed")
    wanted = {f"{kind}/{name}" for name in manifest.shapes for kind in manifest.kinds(name)}
    found += [f"{name}: no such tensor in shapes" for name in sorted(manifest.pieces.keys() - wanted)]
    for name in sorted(wanted):
        pieces, shape = manifest.pieces.get(name, []), manifest.shapes[name.partition("/")[2]]
        wrong = [piece for piece in pieces if not _fits(piece, shape)]
        if wrong:
            found.append(f"{name}: a piece in {wrong[0].file} lies outside shape {shape}: box {wrong[0].box}")
            continue
        times = times_covered(pieces, shape)
        for count, what in ((times[0], "in none of the files"), (times[2], "stored more than once")):
            if count:
                found.append(f"{name}: {count} of {math.prod(shape)} elements are {what}")
    return found


def _fits(piece: Piece, shape: Sequence[int]) -> bool:
    """Whether the piece's box lies in a tensor of `shape`, and its element range in the box."""
    if len(piece.box) != len(shape):
        return False
    inside = all(0 <= start < stop <= length for (start, stop), length in zip(piece.box, shape, strict=True))
    # reshard.py requires a box that is cut along the first two dimensions at most.
    whole = all(edges == (0, length) for edges, length in zip(piece.box[2:], shape[2:], strict=True))
    return inside and whole and 0 <= piece.start < piece.stop <= math.prod(stop - start for start, stop in piece.box)


def times_covered(pieces: Sequence[Piece], shape: Sequence[int]) -> tuple[int, int, int]:
    """How many elements of a tensor are in no piece, in one, and in several."""
    areas = [area for piece in pieces for area in rectangles(piece)]
    rows = np.unique([0, shape[0], *(edge for area in areas for edge in (area.top, area.bottom))])
    width = math.prod(shape[1:])
    columns = np.unique([0, width, *(edge for area in areas for edge in (area.left, area.right))])
    # The pieces' edges cut the matrix into cells; all elements of a cell lie in the same pieces: one count per cell.
    count = np.zeros((len(rows) - 1, len(columns) - 1), dtype=np.int32)
    for area in areas:
        top, bottom = np.searchsorted(rows, (area.top, area.bottom))
        left, right = np.searchsorted(columns, (area.left, area.right))
        count[top:bottom, left:right] += 1
    elements = np.diff(rows)[:, None] * np.diff(columns)[None, :]
    return tuple(int(elements[mask].sum()) for mask in (count == 0, count == 1, count > 1))


def problems_of_file(
    path: Path, record: FileRecord, pieces: Mapping[str, Piece], into: np.ndarray | None = None
) -> list[str]:
    """Problems of one file, of its header and then of its bytes. pieces: key -> the piece that the file should hold
    under it. into: filled with the file's bytes, see `parts.read_file`."""
    if found := problems_of_header(path, record, pieces):
        return found
    try:
        return problems_of_digest(path, record, digest_of(path, record.sha256, into))
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]


def problems_of_header(path: Path, record: FileRecord, pieces: Mapping[str, Piece]) -> list[str]:
    """Problems of a file's header and size."""
    try:
        with closing(TensorFile(path)) as file:
            entries = dict(file.entries)
    except ConfigError as error:
        return error.problems
    found = []
    for key, piece in pieces.items():
        if key not in entries:
            found.append(f"{path}: {key} is missing")
        elif entries[key][:2] != (torch.float32, (piece.stop - piece.start,)):
            found.append(
                f"{path}: {key} is {entries[key][0]} {list(entries[key][1])}, not {piece.stop - piece.start} fp32"
            )
    strangers = sorted(key for key in entries.keys() - pieces.keys() if not key.startswith("rng/"))
    found += [f"{path}: {key} belongs to no tensor" for key in strangers]
    return found if path.stat().st_size == record.size else [*found, _wrong_size(path, record.size)]


def problems_of_digest(path: Path, record: FileRecord, digest: str) -> list[str]:
    if digest == record.sha256:
        return []
    return [f"{path} is damaged: its sha256 is {digest[:25]}..., but {record.sha256[:25]}... was written"]


def _wrong_size(path: Path, size: int) -> str:
    return f"{path} has {path.stat().st_size} bytes, but {size} were written"
