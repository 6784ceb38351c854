"""One format for every engine and layout: saved anywhere, loaded anywhere, bitwise; whole or absent."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from megatron_tn.checkpoint.ahead import ReadAhead
from megatron_tn.checkpoint.files import TensorFile
from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.manifest import CheckpointManifest, whole_checkpoints
from megatron_tn.checkpoint.reshard import pieces_of_local_range
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.checkpoint.save import CheckpointError
from megatron_tn.config import EngineConfig, ModelConfig, to_mapping
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.engine.build import initialize_engine
from megatron_tn.training.step import train_step
from tests.checkpoint.engines import CPU, logical, make_engine, one_step, reads, save_after_two_steps
from tests.engine.test_parity import FSDP2, LAYOUTS, LOCAL, RMSNORM, ZERO, name_of
from tests.helpers.checkpoints import load_model, save_checkpoint
from tests.helpers.models import TINY, TRANSFORMER, Rows, random_batch
from tests.helpers.ranks import run_shared

# Rows wide enough that a slice of each is worth reading by itself.
WIDE = dataclasses.replace(TINY, embed_dim=1024, glu_dim=1536, layers=1)


def load_and_step(
    checkpoint: Path,
    again: Path,
    tp: int,
    engine_config: EngineConfig,
    cp: int = 1,
    shared: bool = False,
    model: ModelConfig = RMSNORM,
) -> float:
    """Load, save what was loaded, and take the next step. What is read ahead gives the same: then the files are in the
    memory of ranks of this machine, and the load reads nothing but headers."""
    config, engine = make_engine(tp, engine_config, model, cp, shared)
    load_checkpoint(engine, checkpoint)
    values = [values.clone() for owned in engine.owned_ranges() for values in owned.values.values()]
    context = engine.context
    ahead = ReadAhead(context.rank, context.world_size, HostMemory(), verify=True, pinned=False)
    assert ahead.problems(checkpoint) == []
    with ahead.contents(checkpoint) as contents, reads() as counts:
        manifest = load_checkpoint(engine, checkpoint, contents)
    files = list(checkpoint.glob("*.safetensors"))
    assert contents.keys() == {file.name for file in files}
    assert sum(counts) <= sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    loaded = [values for owned in engine.owned_ranges() for values in owned.values.values()]
    assert all(map(torch.equal, values, loaded))
    save_checkpoint(
        engine, again, step=2, optimizer_step=manifest.optimizer_step, config=to_mapping(config), training={}
    )
    return one_step(engine, seed=2)


# (world, tp, engine[, cp, sequence parallel, model]) at the save -> at the load: every engine, tensor-parallel and
# context-parallel size on both sides at least once.
MOVES = [
    ((4, 2, ZERO[1], 2, True), (4, 1, ZERO[3])),
    ((4, 1, ZERO[3], 4), (2, 2, ZERO[2], 1, True)),
    ((2, 2, ZERO[2], 1, True), (4, 4, ZERO[1])),
    ((4, 4, ZERO[0]), (1, 1, LOCAL)),
    ((1, 1, LOCAL), (4, 2, FSDP2, 2)),
    ((4, 1, FSDP2, 2), (4, 1, ZERO[0], 4)),
    ((2, 2, ZERO[3], 1, True, TRANSFORMER), (2, 1, FSDP2, 1, False, TRANSFORMER)),
]


def label(side) -> str:
    world, tp, engine, *more = side
    cp, shared, model = (*more, *(1, False, RMSNORM)[len(more) :])
    words = f"{world}x{engine.name[:5]}{engine.zero_stage}tp{tp}cp{cp}" + "sp" * shared
    return words + "-transformer" * (model is TRANSFORMER)


@pytest.mark.parametrize(("saved", "loaded"), MOVES, ids=[f"{label(a)}-to-{label(b)}" for a, b in MOVES])
def test_any_layout_loads_what_any_other_saved(tmp_path, saved, loaded):
    world, *layout = saved
    loss = run_shared(world, save_after_two_steps, tmp_path / "a", *layout)[0]
    world, *layout = loaded
    checkpoint = tmp_path / "a" / "step_00000002"
    losses = run_shared(world, load_and_step, checkpoint, tmp_path / "b", *layout)
    assert losses == pytest.approx([loss] * world, rel=1e-5)
    before, after = logical(checkpoint), logical(tmp_path / "b" / "step_00000002")
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key


ENGINES = (LOCAL, *ZERO, FSDP2)


def save_by_each_engine(folder: Path, tp: int, cp: int) -> dict[Path, float]:
    """Checkpoint -> loss of the step after it."""
    found = {}
    for engine in ENGINES:
        place = folder / name_of(engine)
        found[place / "step_00000002"] = save_after_two_steps(place, tp, engine, cp)
    return found


def load_into_each_engine(checkpoints: dict[Path, float], tp: int, cp: int) -> int:
    """Load every checkpoint into an engine of every kind, one after the other; returns how many loads went well."""
    whole = {checkpoint: logical(checkpoint) for checkpoint in checkpoints}
    loads = 0
    for kind in ENGINES:
        _, engine = make_engine(tp, kind, RMSNORM, cp)
        specs, axis = engine.model.shard_specs(), engine.context.tp
        for checkpoint, loss in checkpoints.items():
            load_checkpoint(engine, checkpoint)
            for owned in engine.owned_ranges():
                for key, values in owned.values.items():
                    local = specs[owned.name].take(whole[checkpoint][f"{key}/{owned.name}"], axis.rank, axis.size)
                    wanted = local.flatten()[owned.start : owned.stop]
                    assert torch.equal(values, wanted), (kind, checkpoint, key, owned.name)
            assert one_step(engine, seed=2) == pytest.approx(loss, rel=1e-5), (kind, checkpoint)
            loads += 1
    return loads


@pytest.fixture(scope="module")
def of_every_layout(tmp_path_factory) -> dict[Path, float]:
    """Saved in each layout of four processes or fewer, by each engine."""
    found = {}
    for world, tp, cp in LAYOUTS:
        folder = tmp_path_factory.mktemp("layout")
        found |= run_shared(world, save_by_each_engine, folder, tp, cp)[0]
    assert len(found) == len(LAYOUTS) * len(ENGINES) == 54
    return found


@pytest.mark.full
@pytest.mark.parametrize(("world", "tp", "cp"), LAYOUTS, ids=str)
def test_every_layout_loads_what_every_other_saved(of_every_layout, world, tp, cp):
    assert run_shared(world, load_into_each_engine, of_every_layout, tp, cp) == [54 * len(ENGINES)] * world


def save_and_go_back(folder: Path, engine_config: EngineConfig, evaluates: bool) -> list[float]:
    """Two saved steps, then the first one again; held-out losses after the first step, and after it was loaded."""
    config, engine = make_engine(1, engine_config)
    initialize_engine(engine, seed=5)
    tokens, targets = random_batch(2, 24, RMSNORM, seed=9)

    @torch.no_grad()
    def evaluate() -> float:
        return engine.model(tokens, targets=targets, return_state=True).loss.item() if evaluates else 0.0

    losses = []
    for step in (1, 2):
        one_step(engine, seed=step)
        losses.append(evaluate())
        options = {"config": to_mapping(config), "training": {}}
        save_checkpoint(engine, folder, step=step, optimizer_step=step, **options)
    load_checkpoint(engine, folder / "step_00000001")
    losses.append(evaluate())
    return losses


UNTIL_BACKWARD = dataclasses.replace(FSDP2, reshard_after_forward=False)


@pytest.mark.parametrize(
    "engine", [LOCAL, ZERO[1], ZERO[3], FSDP2, UNTIL_BACKWARD], ids=["local", "zero1", "zero3", "fsdp2", "fsdp2 kept"]
)
def test_an_evaluation_changes_neither_a_save_nor_a_load(tmp_path, engine):
    """Engines that gather weights for a forward pass must not save, or go on with, what an evaluation gathered."""
    found = run_shared(2, save_and_go_back, tmp_path / "a", engine, True)
    run_shared(2, save_and_go_back, tmp_path / "b", engine, False)
    for first, second, again in found:
        assert first == again != second
    evaluated, plain = (logical(tmp_path / name / "step_00000002") for name in ("a", "b"))
    assert all(torch.equal(evaluated[key], plain[key]) for key in plain)


def load_into_poisoned_memory(checkpoint: Path, tp: int, engine_config: EngineConfig) -> tuple[float, bool]:
    """The step after a load when all that the engine allocated held NaN before it."""
    _, engine = make_engine(tp, engine_config)
    for owned in engine.owned_ranges():
        for values in owned.values.values():
            values.fill_(float("nan"))
    load_checkpoint(engine, checkpoint)
    tokens, targets = random_batch(4, 24, RMSNORM, seed=2)
    share = 4 // engine.context.data.size
    mine = slice(engine.context.data.rank * share, (engine.context.data.rank + 1) * share)
    report = train_step(engine, [Rows(tokens[mine], targets[mine])], 1e-2, CPU)
    return report.loss, report.applied


@pytest.mark.parametrize("engine", [LOCAL, ZERO[1], ZERO[3], FSDP2], ids=lambda e: f"{e.name}{e.zero_stage}")
def test_a_load_leaves_nothing_of_what_memory_held(checkpoint, engine):
    """The vocabulary's padding rows are in no file, and must not keep what was there."""
    found = run_shared(2, load_into_poisoned_memory, checkpoint, 2, engine)
    assert all(applied for _, applied in found)
    assert len({loss for loss, _ in found}) == 1


def test_only_fp32_values_without_padding_are_stored(checkpoint):
    manifest = CheckpointManifest.read(checkpoint)
    stored = sum(piece.stop - piece.start for pieces in manifest.pieces.values() for piece in pieces)
    parameters = sum(torch.Size(shape).numel() for shape in manifest.shapes.values())
    assert stored == 3 * parameters
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}


def test_files_are_as_readable_as_their_folder(checkpoint):
    folder = checkpoint.stat().st_mode & 0o666
    assert {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {folder & ~0o111}


def test_the_model_alone_can_be_loaded(checkpoint):
    model = load_model(checkpoint)
    stored = logical(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[f"param/{name}"])


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path):
    """Also where one was moved to another disk, links were left behind, and a step is saved for the second time."""
    config, engine = make_engine(1, LOCAL)
    initialize_engine(engine, seed=5)
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    for step in (1, 2, 3, 3):
        options = {"config": to_mapping(config), "training": {}, "retention": Retention(newest=2)}
        final = save_checkpoint(engine, folder, step=step, optimizer_step=step, **options)
        if step < 3:
            disk.mkdir(exist_ok=True)
            final.rename(disk / final.name)
            final.symlink_to(disk / final.name)
            (folder / "step_00000009.tmp").symlink_to(disk)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"]
    assert [path.name for path in whole_checkpoints(disk)] == ["step_00000001", "step_00000002"]


def test_a_failed_save_leaves_the_old_ones_and_says_why(tmp_path, monkeypatch):
    config, engine = make_engine(1, LOCAL)
    initialize_engine(engine, seed=5)
    options = {"config": to_mapping(config), "training": {}, "retention": Retention(newest=1)}
    save_checkpoint(engine, tmp_path, step=1, optimizer_step=1, **options)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_tn.checkpoint.save.write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(engine, tmp_path, step=2, optimizer_step=2, **options)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["step_00000001"]


def bytes_read_at(checkpoint: Path, tp: int, engine_config: EngineConfig) -> tuple[int, int]:
    """(bytes that this rank read to load the checkpoint, bytes of what it owns without padding)."""
    _, engine = make_engine(tp, engine_config, WIDE)
    context, specs = engine.context, engine.model.shard_specs()
    needed, opened = 0, []
    for owned in engine.owned_ranges():
        pieces = pieces_of_local_range(specs[owned.name], context.tp.rank, tp, owned.start, owned.stop)
        needed += sum(12 * (piece.stop - piece.start) for piece, _ in pieces)
    real = TensorFile.close
    TensorFile.close = lambda file: (opened.append(file), real(file))
    load_checkpoint(engine, checkpoint)
    TensorFile.close = real
    return sum(file.bytes_read for file in opened), needed


def save_wide(folder: Path, tp: int, engine_config: EngineConfig) -> None:
    config, engine = make_engine(tp, engine_config, WIDE)
    initialize_engine(engine, seed=5)
    save_checkpoint(engine, folder, step=1, optimizer_step=0, config=to_mapping(config), training={})


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((1, 1, LOCAL), (4, 4, ZERO[1])),
        ((2, 2, ZERO[1]), (4, 2, ZERO[3])),
        ((2, 1, ZERO[3]), (2, 2, ZERO[1])),
        ((2, 2, ZERO[2]), (4, 1, FSDP2)),
    ],
    ids=lambda side: label(side),
)
def test_a_rank_reads_what_it_needs_and_little_more(tmp_path, saved, loaded):
    run_shared(saved[0], save_wide, tmp_path, *saved[1:])
    whole = sum(path.stat().st_size for path in (tmp_path / "step_00000001").glob("*.safetensors"))
    for read, needed in run_shared(loaded[0], bytes_read_at, tmp_path / "step_00000001", *loaded[1:]):
        assert needed < 0.6 * whole
        assert needed <= read <= 1.02 * needed + 50_000  # the headers, and the 5 kB of random state


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_an_error_that_names_the_folder(tmp_path):
    config, engine = make_engine(1, LOCAL)
    initialize_engine(engine, seed=5)
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        save_checkpoint(engine, tmp_path, step=1, optimizer_step=1, config=to_mapping(config), training={})
