"""Muon in every layout against its definition, one logical matrix after the other; and against torch's."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from kernels.newton_schulz import reference
from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.verify import verify
from megatron_tn.config import ConfigError, EngineConfig, OptimConfig, ParallelConfig, to_mapping
from megatron_tn.engine import matrices
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.engine.shards import Placement
from megatron_tn.engine.update import Update
from megatron_tn.optim.build import build_optimizer
from megatron_tn.optim.groups import is_block_matrix, is_decayed, parameter_groups
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sharding import ShardSpec
from megatron_tn.training.step import train_step
from tests.checkpoint.engines import logical
from tests.engine.test_parity import FSDP2, LOCAL, RMSNORM, ZERO, ZERO_BF16, name_of
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared, this_device

CPU = torch.device("cpu")
LR = 1e-2
MUON = OptimConfig(name="muon", lr=LR, embedding_lr_ratio=3.0, clip_norm=1.0, momentum_warmup_steps=4)
OPTIONS = dataclasses.replace(MUON, equal_norms=True, heads_apart=True)
# With an uneven split over two ranks, a packed projection, a head that two ranks share, and both orientations.
SPECS = {
    "model.embed_tokens.weight": ShardSpec((11, 6), dim=0, padded=12),
    "model.layers.0.token_mixer.qkvu_proj.weight": ShardSpec((24, 6), dim=0, blocks=4, heads=3),
    "model.layers.0.token_mixer.out_proj.weight": ShardSpec((6, 6), dim=1),
    "model.layers.0.channel_mixer.l1.weight": ShardSpec((9, 6), dim=0),
    "model.layers.0.channel_mixer.l3.weight": ShardSpec((6, 9), dim=1),
    "model.layers.0.token_norm.weight": ShardSpec((6,)),
}
MATRICES = [name for name, spec in SPECS.items() if is_block_matrix(name, len(spec.shape))]
STEPS = 3
CUTS = ("whole", "flat", "each", "rows")


def whole(name: str, number: int) -> Tensor:
    """A logical tensor in fp64: the initial values (0), or the gradient of step `number`."""
    draw = torch.Generator().manual_seed(1000 * number + list(SPECS).index(name))
    return torch.randn(SPECS[name].shape, generator=draw, dtype=torch.float64)


def blocks(name: str, tensor: Tensor, config: OptimConfig) -> tuple[Tensor, ...]:
    """The logical matrices of a parameter."""
    return tensor.chunk(SPECS[name].blocks * (SPECS[name].heads if config.heads_apart else 1))


def by_definition(config: OptimConfig) -> dict[str, Tensor]:
    """The blocks' matrices after STEPS steps: each logical matrix by itself, in fp64."""
    found = {}
    for name in MATRICES:
        updated = []
        for index, matrix in enumerate(blocks(name, whole(name, 0), config)):
            momentum = torch.zeros_like(matrix)
            for step in range(STEPS):
                mu = 0.85 + (0.95 - 0.85) * step / 4
                gradient = blocks(name, whole(name, step + 1), config)[index]
                momentum = mu * momentum + (1 - mu) * gradient
                update = reference.newton_schulz((1 - mu) * gradient + mu * momentum, 5)
                if config.equal_norms:
                    update = reference.equalize_norms(update)
                matrix = matrix - LR * (0.2 * math.sqrt(max(matrix.shape)) * update + 0.1 * matrix)
            updated.append(matrix)
        found[name] = torch.cat(updated)
    return found


class CutShards:
    """See `engine.shards.Shards`. fp64 masters, cut over data-parallel ranks as an engine does: "whole" (not at all),
    "rows" (FSDP2), "each" (ZeRO 3: every parameter into equal parts) or "flat" (ZeRO 1 and 2: the parameters of a
    group behind each other, padded, then cut)."""

    def __init__(self, context: ParallelContext, cut: str):
        self.copies: dict[Tensor, Tensor] = {}
        self.context, self.cut = context, cut
        self.sharded_over = context.data if cut != "whole" else type(context.data)()
        self.placements, self.groups = [], []
        locals_ = {name: self.local(name, 0) for name in SPECS}
        named = [(name, name, len(spec.shape)) for name, spec in SPECS.items()]
        self.lengths = {name: value.numel() for name, value in locals_.items()}
        self.members = []
        for group in parameter_groups(named, MUON):
            runs = [group["params"]] if cut == "flat" else [[name] for name in group["params"]]
            self.groups.append(group | {"params": range(len(self.members), len(self.members) + len(runs))})
            self.members += runs
        for index, names in enumerate(self.members):
            at = 0
            for name in names:
                begin, end = self.bounds(names)
                start, stop = max(begin - at, 0), min(end - at, self.lengths[name])
                if start < stop:
                    self.placements.append(Placement(name, start, stop, index, at + start - begin))
                at += self.lengths[name]
        self.masters = [nn.Parameter(self.part(names, 0)) for names in self.members]
        self.groups = [group | {"params": [self.masters[i] for i in group["params"]]} for group in self.groups]
        self.step = 0

    def local(self, name: str, number: int) -> Tensor:
        return SPECS[name].take(whole(name, number), self.context.tp.rank, self.context.tp.size).flatten()

    def bounds(self, names: list[str]) -> tuple[int, int]:
        """This rank's range of the flattened members of a master; it may reach beyond their end."""
        length = sum(self.lengths[name] for name in names)
        unit = self.local(names[0], 0).numel() // self.rows(names[0]) if self.cut == "rows" else 1
        if self.cut == "whole":
            return 0, length
        part = unit * -(-length // unit // self.sharded_over.size)
        return self.sharded_over.rank * part, (self.sharded_over.rank + 1) * part

    def rows(self, name: str) -> int:
        return SPECS[name].local_shape(self.context.tp.rank, self.context.tp.size)[0]

    def part(self, names: list[str], number: int) -> Tensor:
        begin, end = self.bounds(names)
        flat = torch.cat([self.local(name, number) for name in names])
        return torch.cat([flat[begin:end], flat.new_zeros(end - begin - len(flat[begin:end]))])

    def gradients(self) -> list[Tensor]:
        self.step += 1
        return [self.part(names, self.step) for names in self.members]

    def clear(self) -> None:
        pass

    def publish(self) -> None:
        pass


def cut_steps(
    tp: int, dtypes: list[torch.dtype], round_elements: int, config: OptimConfig = OPTIONS
) -> dict[str, list[tuple[str, int, Tensor]]]:
    """By cut and type of the iterations: this rank's (name, start, elements) of the blocks' matrices after STEPS."""
    found, before = {}, matrices.ROUND_ELEMENTS
    matrices.ROUND_ELEMENTS = round_elements
    context = layout(tp)
    for cut in CUTS:
        for dtype in dtypes:
            shards = CutShards(context, cut)
            optimizer = build_optimizer(shards.groups, dataclasses.replace(config, fused="torch"), dtype)
            update = Update(optimizer, shards, SPECS, context.tp, clip_norm=0)
            for _ in range(STEPS):
                assert update.step(LR).applied
            found[f"{cut} {dtype}"] = [(r.name, r.start, r.values["param"].clone()) for r in update.owned_ranges()]
    matrices.ROUND_ELEMENTS = before
    return found


BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2}


def steps_alone(dtype: torch.dtype, config: OptimConfig) -> dict[str, Tensor]:
    """The changes of the blocks' matrices in one process."""
    steps = cut_steps(1, [dtype], 72, config)[f"whole {dtype}"]
    return {name: part.view(SPECS[name].shape) - whole(name, 0) for name, _, part in steps if name in MATRICES}


@pytest.fixture(scope="module")
def alone() -> dict[torch.dtype, dict[str, Tensor]]:
    """By type of the iterations."""
    return {dtype: steps_alone(dtype, OPTIONS) for dtype in BOUNDS}


@pytest.mark.parametrize("config", [MUON, OPTIONS], ids=["no options", "equal norms, heads apart"])
def test_one_process_takes_the_steps_of_the_definition(config):
    found, wanted = steps_alone(torch.float64, config), by_definition(config)
    for name in MATRICES:
        change = wanted[name] - whole(name, 0)
        assert (found[name] - change).norm() <= 1e-9 * change.norm(), name


@pytest.mark.parametrize(("world", "tp", "round_elements"), [(2, 2, 1 << 26), (2, 1, 72), (4, 2, 72)], ids=str)
def test_every_cut_of_the_masters_takes_the_steps_of_one_process(alone, world, tp, round_elements):
    ranks = run_shared(world, cut_steps, tp, list(BOUNDS), round_elements)
    for (dtype, bound), cut in itertools.product(BOUNDS.items(), CUTS):
        seen = dict.fromkeys(MATRICES, 0)
        for rank, found in enumerate(ranks):
            for name, start, part in found[f"{cut} {dtype}"]:
                if name in MATRICES:
                    before, change = (
                        SPECS[name].take(logical, rank % tp, tp).flatten()[start : start + len(part)]
                        for logical in (whole(name, 0), alone[dtype][name])
                    )
                    assert (part - before - change).norm() <= bound * change.norm(), (cut, dtype, name, rank)
                    seen[name] += len(part)
        copies = world // tp if cut == "whole" else 1
        assert seen == {name: copies * math.prod(SPECS[name].shape) for name in MATRICES}


class Part(NamedTuple):
    """What a step changed in elements [start, start + len(change)) of a rank's part of a parameter."""

    name: str
    spec: ShardSpec
    start: int
    change: Tensor


def label(engine: EngineConfig) -> str:
    return f"{name_of(engine)} {engine.precision}"


def muon_engine(tp: int, engine_config: EngineConfig, optim: OptimConfig = MUON):
    config = tiny_config(model=RMSNORM, engine=engine_config, parallel=ParallelConfig(tp=tp), optim=optim)
    engine = build_engine(config, layout(tp), this_device())
    initialize_engine(engine, seed=3)
    return config, engine


def one_step(engine, seed: int) -> float:
    """The loss of a step on the same four rows, however many ranks share them."""
    dp = engine.context.dp
    rows = [part.chunk(dp.size)[dp.rank].to(this_device()) for part in random_batch(4, 23, RMSNORM, seed=seed)]
    report = train_step(engine, [Rows(*rows)], LR, this_device())
    assert report.applied
    return report.loss


def changes(tp: int, engines: list[EngineConfig]) -> dict[str, list[Part]]:
    """By engine, of the second step."""
    found = {}
    for engine_config in engines:
        _, engine = muon_engine(tp, engine_config, dataclasses.replace(MUON, heads_apart=True))
        one_step(engine, seed=0)
        before = [owned.values["param"].clone() for owned in engine.owned_ranges()]
        one_step(engine, seed=1)
        pairs = zip(engine.owned_ranges(), before, strict=True)
        specs = engine.model.shard_specs()
        found[label(engine_config)] = [
            Part(owned.name, specs[owned.name], owned.start, (owned.values["param"] - was).cpu())
            for owned, was in pairs
        ]
    return found


def errors(ranks: list[dict[str, list[Part]]], tp: int, engine: EngineConfig, wanted: dict[str, Tensor]) -> Tensor:
    """Relative to the wanted change, in norm, of each parameter."""
    squares: dict[str, list[Tensor]] = {}
    for rank, found in enumerate(ranks):
        for name, spec, start, change in found[label(engine)]:
            exact = spec.take(wanted[name], rank % tp, tp).flatten()[start : start + len(change)]
            pair = [(change[: len(exact)] - exact).square().sum(), exact.square().sum()]
            squares.setdefault(name, []).append(torch.stack(pair))
    assert squares.keys() == wanted.keys()
    difference, size = torch.stack([torch.stack(parts).sum(0) for parts in squares.values()]).unbind(1)
    return (difference / size).sqrt()


FSDP2_BF16 = dataclasses.replace(FSDP2, precision="bf16")
LOCAL_BF16 = dataclasses.replace(LOCAL, precision="bf16")


GPU = pytest.mark.gpu(2)


@pytest.mark.parametrize(
    ("world", "tp", "device"),
    [(2, 2, "cpu"), (2, 1, "cpu"), (4, 2, "cpu"), *(pytest.param(2, tp, "cuda", marks=GPU) for tp in (1, 2))],
    ids=str,
)
def test_every_engine_takes_the_steps_of_one_process(world, tp, device):
    engines = [LOCAL, *ZERO, FSDP2]
    alone = changes(1, [LOCAL]) if device == "cpu" else run_shared(1, changes, 1, [LOCAL], device=device)[0]
    wanted = {part.name: part.change.view(part.spec.shape) for part in alone["local fp32"]}
    ranks = run_shared(world, changes, tp, engines, device=device)
    for engine in engines:
        assert errors(ranks, tp, engine, wanted).max() < 1e-3, engine


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_engines_with_the_same_bf16_gradients_take_the_same_steps(device):
    """Gradients in bf16 differ over layouts by more than the steps may, so these are of one layout."""
    kinds = [[LOCAL_BF16, ZERO_BF16[1]], [ZERO_BF16[2], ZERO_BF16[3], FSDP2_BF16]]  # fp32 sums, bf16 sums
    ranks = run_shared(2, changes, 1, [engine for engines in kinds for engine in engines], device=device)
    for first, *others in kinds:
        wanted = {}
        for name, spec, start, change in itertools.chain(*(found[label(first)] for found in ranks)):
            wanted.setdefault(name, torch.empty(spec.shape)).view(-1)[start : start + len(change)] = change
        for engine in others:
            assert errors(ranks, 1, engine, wanted).max() < 3e-2, engine


def test_steps_are_those_of_torchs_muon_and_adamw():
    """q, k, v and u are given to torch one by one. Its iterations are in bf16, whose rounding alone is worth several
    percent; without its cast they are in fp32, as this engine's."""
    _, engine = muon_engine(1, LOCAL)
    specs, held = engine.model.shard_specs(), {owned.name: owned.values["param"] for owned in engine.owned_ranges()}
    theirs, kinds = {}, {"matrix": [], "embedding": [], "rest": []}
    for name, spec in specs.items():
        theirs[name] = [nn.Parameter(part.clone()) for part in held[name].view(spec.shape).chunk(spec.blocks)]
        matrix, decayed = is_block_matrix(name, len(spec.shape)), is_decayed(name, len(spec.shape))
        kinds["matrix" if matrix else "embedding" if decayed else "rest"] += theirs[name]
    muon = torch.optim.Muon(kinds["matrix"], lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    embedding = {"params": kinds["embedding"], "weight_decay": 0.1, "lr": 3 * LR}
    groups = [embedding, {"params": kinds["rest"], "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    for step in range(3):
        tokens, targets = random_batch(4, 23, RMSNORM, seed=step)
        engine.forward_backward(tokens, targets, None, scale=1 / (targets != -100).sum(), last=True)
        for name, gradient in engine.named_logical_gradients().items():
            for part, of_part in zip(theirs[name], gradient.chunk(len(theirs[name])), strict=True):
                part.grad = of_part.clone()
        torch.nn.utils.clip_grad_norm_(itertools.chain(*theirs.values()), 1.0)
        muon.param_groups[0]["momentum"] = 0.85 + 0.1 * step / 4
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            muon.step()
        adamw.step()
        before = {name: value.clone() for name, value in held.items()}
        assert engine.step(LR).applied
        for name, parts in theirs.items():
            change = held[name] - before[name]
            wanted = torch.cat([part.detach() for part in parts]).flatten() - before[name]
            assert (change - wanted).norm() < 1e-4 * wanted.norm(), (step, name)
            for part, value in zip(parts, held[name].view(specs[name].shape).chunk(len(parts)), strict=True):
                part.data.copy_(value)  # the next step begins at the same weights


def save_and_go_on(folder: Path, tp: int, engine_config: EngineConfig) -> list[float]:
    """Save after two steps; the losses of the next two."""
    config, engine = muon_engine(tp, engine_config)
    for seed in range(2):
        one_step(engine, seed)
    save_checkpoint(engine, folder, step=2, optimizer_step=2, config=to_mapping(config), training={"step": 2})
    return [one_step(engine, seed) for seed in (2, 3)]


def load_and_go_on(checkpoint: Path, again: Path, tp: int, engine_config: EngineConfig) -> list[float]:
    """Save what was loaded; the losses of the next two steps."""
    config, engine = muon_engine(tp, engine_config)
    manifest = load_checkpoint(engine, checkpoint)
    options = {"config": to_mapping(config), "training": {"step": 2}}
    save_checkpoint(engine, again, step=2, optimizer_step=manifest.optimizer_step, **options)
    return [one_step(engine, seed) for seed in (2, 3)]


MOVES = [
    ((4, 2, ZERO[1]), (2, 1, FSDP2)),
    ((2, 1, FSDP2), (2, 2, ZERO[3])),
    ((2, 2, ZERO[2]), (4, 2, ZERO[1])),
    ((4, 2, ZERO_BF16[1]), (4, 2, ZERO_BF16[1])),
]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    MOVES,
    ids=lambda side: f"{side[0]}x tp{side[1]} {label(side[2])}",
)
def test_momentum_moves_between_layouts_bitwise(tmp_path, saved, loaded):
    (world, tp, engine), (new_world, new_tp, new_engine) = saved, loaded
    losses = run_shared(world, save_and_go_on, tmp_path / "saved", tp, engine)[0]
    found = run_shared(
        new_world, load_and_go_on, tmp_path / "saved/step_00000002", tmp_path / "again", new_tp, new_engine
    )[0]
    assert found == losses if saved == loaded else found == pytest.approx(losses, rel=1e-5)
    before, after = (logical(tmp_path / folder / "step_00000002") for folder in ("saved", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    matrix, norm = "model.layers.0.token_mixer.qkvu_proj.weight", "model.final_norm.weight"
    kinds = {key.partition("/")[0] for key in before if key.endswith(matrix)}
    assert kinds == {"param", "momentum"}
    assert {key.partition("/")[0] for key in before if key.endswith(norm)} == {"param", "exp_avg", "exp_avg_sq"}
    assert before[f"momentum/{matrix}"].norm() > 0


def test_a_checkpoint_of_another_optimizer_and_a_lost_momentum_are_named(tmp_path):
    save_and_go_on(tmp_path, 1, LOCAL)
    checkpoint = tmp_path / "step_00000002"
    adamw = build_engine(tiny_config(model=RMSNORM), ParallelContext(), CPU)
    with pytest.raises(ConfigError, match=r"holds momentum, exp_avg, exp_avg_sq of each .* keeps exp_avg, exp_avg_sq"):
        load_checkpoint(adamw, checkpoint)
    assert verify(checkpoint) == []
    file = checkpoint / "manifest.json"
    values = json.loads(file.read_text())
    del values["pieces"]["momentum/model.layers.1.channel_mixer.l1.weight"]
    file.write_text(json.dumps(values))
    assert any("momentum/model.layers.1.channel_mixer.l1.weight: 6144 of 6144" in line for line in verify(checkpoint))
    with pytest.raises(ConfigError, match="6144 elements of momentum/model"):
        load_checkpoint(muon_engine(1, LOCAL)[1], checkpoint)


def test_settings_of_muon_are_not_read_in_silence():
    options = {"momentum": 0.9, "momentum_warmup_steps": 3, "equal_norms": True, "heads_apart": True}
    problems = tiny_config(optim=OptimConfig(**options)).problems()
    assert [line for line in problems if "is a setting of optim.name=muon, but optim.name=adamw" in line] == problems
    assert len(problems) == len(options)
    assert tiny_config(optim=MUON).problems() == []
