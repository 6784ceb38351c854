"""Plans of memory: by hand, beside real engines and models on a CPU, and beside what GPUs took."""

import dataclasses
import time

import pytest
import torch

from kernels import newton_schulz
from megatron_tn.config import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    from_mapping,
)
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model, norm_bound
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.float8_layers import float8_layers, kept_weights, layer_groups, marked_layers
from megatron_tn.parallel.recompute import recompute_blocks
from megatron_tn.plan import main
from megatron_tn.planning import microbatch as passes
from megatron_tn.planning.estimate import GIB, buffer_bytes, plan_memory, state_bytes, update_bytes
from megatron_tn.planning.live import LiveMemory
from megatron_tn.planning.microbatch import extrapolated, microbatch
from megatron_tn.planning.remedies import memory_problems
from megatron_tn.training.preflight import problems_before_start
from tests.engine.test_parity import ZERO
from tests.helpers.models import TINY, random_batch, tiny_config
from tests.helpers.ranks import run_ranks, run_shared
from tests.helpers.saved import saved_bytes
from tests.helpers.sizes import compose_model
from tests.helpers.training import call

BF16 = [EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16") for stage in range(4)]
BATCH = ("data.global_batch=256",)


def test_seven_billion_on_eight_gpus_by_hand():
    model = from_mapping(type(TINY), compose_model("7b"))
    config = dataclasses.replace(TrainConfig(), model=model, parallel=ParallelConfig(tp=2))
    found = state_bytes(config, world_size=8)
    local = 6_836_719_616 / 2
    assert found == {"parameters": local * 2, "gradients": local * 4, "masters": local, "moments": local * 2}


def held(engines: list[EngineConfig], optim: OptimConfig) -> list[dict[str, int]]:
    """Of each engine, bytes of parameters, of masters that are tensors of their own, and of moments, on this rank."""
    found = []
    for engine_config in engines:
        engine = build_engine(
            tiny_config(engine=engine_config, optim=optim), ParallelContext.create(), torch.device("cpu")
        )
        ranges = engine.owned_ranges()
        masters = sum(r.values["param"].numel() * 4 for r in ranges)
        moments = sum(value.numel() * 4 for r in ranges for value in r.values.values()) - masters
        stored = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters()]
        for group in layer_groups(marked_layers(engine.model)):
            stored += [group[0].float8.kept.rows, group[0].float8.kept.transposed] if group[0].float8.kept else []
        storages = [tensor.untyped_storage() for tensor in stored]
        parameters = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
        found.append({"parameters": parameters, "masters": masters, "moments": moments})
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_engines_hold_what_is_planned(optimizer):
    """In fp8 ZeRO 3's parts stay in bf16: blocks are gathered from them, and quantised then."""
    fp8 = [dataclasses.replace(BF16[stage], products="fp8") for stage in (1, 3)] if optimizer == "adamw" else []
    engines, optim = [*ZERO[1:], *BF16, *fp8], OptimConfig(name=optimizer)
    for ranks in run_shared(2, held, engines, optim):
        for engine, found in zip(engines, ranks, strict=True):
            planned = state_bytes(tiny_config(engine=engine, model=TINY, optim=optim), world_size=2)
            for kind, size in found.items():
                assert size == pytest.approx(planned[kind], rel=0.02), (engine, kind)


def test_muons_update_takes_what_is_planned():
    model = from_mapping(ModelConfig, compose_model("7b"))
    config = dataclasses.replace(TrainConfig(), model=model, optim=OptimConfig(name="muon"))
    in_matrices = model.layers * (5 * model.embed_dim**2 + 3 * model.embed_dim * model.glu_dim)
    assert state_bytes(config, 1)["moments"] == 8 * 6_836_719_616 - 4 * in_matrices
    planned = update_bytes(config, 8, 0)
    assert planned == 4 * 2 * 2**26  # 16 matrices of 2048 x 2048 in bf16, and three tensors as large
    assert update_bytes(config, 8, planned) == 0
    graph = dataclasses.replace(config, engine=dataclasses.replace(config.engine, cuda_graph=True))
    assert update_bytes(graph, 8, planned) == planned
    for columns in (32, 64):  # iterations one by one, and joined
        sent = torch.zeros(16, 32, columns, dtype=torch.bfloat16)
        with LiveMemory() as memory:
            newton_schulz(sent)
        assert sent.nbytes + memory.peak == pytest.approx(4 * sent.nbytes, rel=0.01)


def test_the_command_line_says_when_it_does_not_fit(capsys):
    assert call(main, "model=1b", "parallel.tp=8", "engine=zero1", "cluster=a100_80g", "nodes=16", *BATCH) == 0
    assert "1,020,266,496 parameters" in capsys.readouterr().out
    shallow = ("model=1b", "model.layers=4", "engine=zero1", "cluster=a100_80g", "cluster.gpu_memory_gib=28")
    assert call(main, *shallow, "data.micro_batch=32", *BATCH) == 2
    said = capsys.readouterr().err
    assert "GiB, but cluster.gpu_memory_gib=28.0 (parameters 0.7" in said
    assert "data.micro_batch=32" in said
    assert "data.micro_batch=16 needs" in said
    assert "engine.recompute=selective needs" in said


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path):
    config = tiny_config(run_dir=str(tmp_path), cluster=ClusterConfig(gpu_memory_gib=1.5))
    (problem,) = problems_before_start(config, 1, None)
    assert "a rank needs 1.5 GiB, but cluster.gpu_memory_gib=1.5" in problem
    roomy = dataclasses.replace(config, cluster=ClusterConfig(gpu_memory_gib=2.0))
    assert problems_before_start(roomy, 1, None) == []


WIDE = ModelConfig(vocab_size=512, embed_dim=128, layers=4, heads=4, glu_dim=384)
WIDE_TRANSFORMER = dataclasses.replace(
    WIDE, architecture="transformer", norm="rmsnorm", glu_act="silu", scale_embedding=False
)


def shape(
    tp: int = 1,
    cp: int = 1,
    recompute: str = "none",
    every: int = 1,
    lrpe: str = "first",
    rows: int = 2,
    shared: bool = False,
    model: ModelConfig = WIDE,
    products: str = "bf16",
):
    return tiny_config(
        model=dataclasses.replace(model, lrpe=lrpe),
        parallel=ParallelConfig(tp=tp, cp=cp, sequence_parallel=shared),
        engine=EngineConfig(
            name="local", precision="fp32", recompute=recompute, recompute_every=every, products=products
        ),
        data=DataConfig(sequence_length=256, global_batch=rows, micro_batch=rows),
    )


def test_a_sequence_too_long_for_a_rank_is_offered_to_several():
    config = dataclasses.replace(
        shape(recompute="full"),
        data=DataConfig(sequence_length=1 << 18, global_batch=8, micro_batch=1),
        cluster=ClusterConfig(gpu_memory_gib=1.5, outside_allocator_gib=0.0),
    )
    (problem,) = memory_problems(config, 8)
    assert "in GiB: parallel.cp=4 needs 1.1" in problem


def measured(config: TrainConfig) -> tuple[int, int, int | None]:
    """A real microbatch: bytes kept for backward and at most, and, without recomputation, what autograd saved by its
    own hooks."""
    parallel = config.parallel
    context = ParallelContext.create(parallel.tp, parallel.cp, sequence_parallel=parallel.sequence_parallel)
    model = build_model(config.model, context, "cpu", torch.float32)
    initialize(model, 0)
    operands = []
    if config.engine.products == "fp8":
        layers = float8_layers(model.blocks, norm_bound(config.model))
        kept_weights(layer_groups(layers), transposed=config.engine.keeps_fp8_transposes)
        operands = [layer.float8.kept.rows for layer in layers]
    recompute_blocks(model.model.layers, config.engine.recompute, config.engine.recompute_every)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    tokens, targets = random_batch(config.data.micro_batch, config.data.sequence_length, config.model)
    saved, outputs, found = None, [], []
    if config.engine.recompute == "none":
        saved = saved_bytes(
            lambda: outputs.append(model(tokens, targets=targets, reduction="sum").loss), tuple(model.parameters())
        )
        outputs.clear()
    # gloo's threads may hold what they sent a moment longer than it is waited for: the least counts.
    for _ in range(3 if parallel.tp * parallel.cp > 1 else 1):
        with LiveMemory() as memory:
            for tensor in (*model.parameters(), *operands, tokens, targets):
                memory.add(tensor)
            before = memory.current
            loss = model(tokens, targets=targets, reduction="sum").loss
            kept = memory.current
            loss.backward()
        found.append((kept - before, memory.peak - before))
        del loss
    least_kept, least_peak = map(min, zip(*found, strict=True))
    return least_kept, least_peak, saved


SHAPES = {
    "none": shape(),
    "lrpe everywhere": shape(lrpe="all"),
    "one row": shape(rows=1),
    "full": shape(recompute="full"),
    "selective": shape(recompute="selective"),
    "every second": shape(recompute="full", every=2),
    "tp2": shape(tp=2),
    "tp2 selective": shape(tp=2, recompute="selective"),
    "cp2": shape(cp=2),
    "tp2 full": shape(tp=2, recompute="full"),
    "tp2 shared": shape(tp=2, shared=True),
    "tp2 shared selective": shape(tp=2, recompute="selective", shared=True),
    "tp2 shared full": shape(tp=2, recompute="full", shared=True),
    "transformer": shape(model=WIDE_TRANSFORMER),
    "transformer selective": shape(model=WIDE_TRANSFORMER, recompute="selective"),
    "transformer tp2 shared": shape(model=WIDE_TRANSFORMER, tp=2, shared=True),
    "fp8": shape(products="fp8"),
    "fp8 tp2 shared selective": shape(tp=2, shared=True, recompute="selective", products="fp8"),
    "tp2 cp2 shared": shape(tp=2, cp=2, rows=1, shared=True),
}


def measured_each(configs: list[TrainConfig]) -> list[tuple[int, int, int | None]]:
    return [measured(config) for config in configs]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_activations_are_those_of_the_real_model(world):
    """All layouts of one size are measured in one world."""
    shapes = {name: c for name, c in SHAPES.items() if c.parallel.tp * c.parallel.cp == world}
    configs = list(shapes.values())
    for rank in run_ranks(world, measured_each, configs) if world > 1 else [measured_each(configs)]:
        for (name, config), (kept, peak, saved) in zip(shapes.items(), rank, strict=True):
            predicted = microbatch(config, device="cpu")
            print(f"{name}: kept {predicted.kept} predicted, {kept} alive, {saved} saved by autograd; ", end="")
            print(f"peak {predicted.peak} predicted, {peak} alive")
            assert predicted.kept == pytest.approx(kept, rel=0.01), name
            assert predicted.peak == pytest.approx(peak, rel=0.01), name
            if saved is not None:
                assert predicted.kept == pytest.approx(saved, rel=0.01), name


def test_recomputation_and_parallelism_save_what_they_should():
    names = ("none", "selective", "full", "every second", "fp8")
    names += ("tp2", "tp2 full", "tp2 shared", "tp2 shared full", "cp2")
    kept = {name: microbatch(SHAPES[name]).kept for name in names}
    assert kept["full"] < kept["every second"] < kept["none"]
    assert kept["full"] < kept["selective"] < kept["none"]
    assert kept["tp2"] < kept["none"]
    assert kept["tp2 shared"] < 0.85 * kept["tp2"]
    assert kept["tp2 shared full"] < 0.65 * kept["tp2 full"]
    assert kept["cp2"] < 0.6 * kept["none"]
    assert kept["fp8"] < 0.9 * kept["none"]


def test_a_machine_with_a_gpu_plans_as_one_without(monkeypatch):
    config = tiny_config(engine=EngineConfig(name="local", precision="bf16"))
    alone = microbatch(config)
    passes._measured.clear()

    def capability(device=None):
        assert torch.device(device).type == "cuda", "the plan's tensors are on no GPU, whatever they say"
        return 9, 0

    monkeypatch.setattr("kernels.lightning.op.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("kernels.lightning.op.torch.cuda.get_device_capability", capability)
    assert microbatch(config) == alone


def test_the_largest_model_is_planned_in_seconds():
    model = from_mapping(ModelConfig, compose_model("175b"))
    config = dataclasses.replace(TrainConfig(), model=model, parallel=ParallelConfig(tp=8))
    began = time.monotonic()
    plan = plan_memory(config, 512)
    assert time.monotonic() - began < 60
    assert 30 * GIB < plan.total < 300 * GIB


def test_remedies_of_the_largest_model_follow_a_few_layers_each(monkeypatch):
    """All layers once, for the layout itself: what does not fit is refused within seconds, too."""
    model, followed = from_mapping(ModelConfig, compose_model("175b")), []

    def measure(config, device):
        followed.append(config.model.layers)
        return passes.Microbatch(GIB * config.model.layers, GIB * config.model.layers, {}, 0, {})

    monkeypatch.setattr(passes, "_measured", {})
    monkeypatch.setattr(passes, "_measure", measure)
    config = dataclasses.replace(TrainConfig(), model=model, parallel=ParallelConfig(tp=8))
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, gpu_memory_gib=80.0))
    (problem,) = memory_problems(config, 512)
    assert "nothing tried is enough" in problem
    assert followed[0] == model.layers
    assert len(followed) > 5
    assert max(followed[1:]) <= 3
    none = dataclasses.replace(
        config, data=DataConfig(global_batch=1), engine=EngineConfig(name="fsdp2", recompute="full")
    )
    (problem,) = memory_problems(none, 8)
    assert problem.endswith("; in GiB: nothing tried needs less: take more nodes")


def step_peaks(configs: list[TrainConfig]) -> list[int]:
    return [step_peak(config) for config in configs]


def step_peak(config: TrainConfig) -> int:
    """Bytes of tensors alive at the peak of an engine's second step."""
    context = ParallelContext.create(config.parallel.tp)
    tokens, targets = random_batch(1, config.data.sequence_length, config.model)
    with LiveMemory() as memory:
        engine = build_engine(config, context, torch.device("cpu"))
        initialize_engine(engine, 0)
        for _ in range(2):
            memory.peak = memory.current
            engine.forward_backward(tokens, targets, None, scale=torch.tensor(1e-3), last=True)
            engine.step(1e-4)
    return memory.peak


def test_engines_take_what_is_planned_at_their_peak():
    configs = [
        tiny_config(
            model=dataclasses.replace(WIDE, vocab_size=1024, embed_dim=384, glu_dim=1024),
            engine=dataclasses.replace(engine, reduce_bucket_elements=200_000),
            data=DataConfig(sequence_length=64, global_batch=2, micro_batch=1),
        )
        for engine in (EngineConfig(name="local"), *BF16[1:3])
    ]
    for peaks in run_ranks(2, step_peaks, configs):
        for config, peak in zip(configs, peaks, strict=True):
            activations = microbatch(config, device="cpu").peak
            planned = sum(state_bytes(config, 2).values()) + buffer_bytes(config, 2, activations) + activations
            print(f"{config.engine.name} {config.engine.zero_stage}: {planned} planned, {peak} alive")
            assert planned == pytest.approx(peak, rel=0.10), config.engine


# Peaks of the allocator on H200s, of four GPUs on H100s (docs/memory.md): bf16, a microbatch of rows x length.
GRAPH = EngineConfig(cuda_graph=True)
TP2, TP4, TP8 = (ParallelConfig(tp=tp, sequence_parallel=True) for tp in (2, 4, 8))
SLICE = EngineConfig(name="local", cuda_graph=True)  # megatron_tn/benchmarking/block.py
MEASURED = {
    "1b local": ("1b", (8, 2048), EngineConfig(name="local"), ParallelConfig(), 1, 39.5),
    "1b full": ("1b", (1, 16384), EngineConfig(name="local", recompute="full"), ParallelConfig(), 1, 19.9),
    "1b zero1 graph": ("1b", (8, 2048), GRAPH, ParallelConfig(), 1, 40.0),
    "3b zero1 graph": ("3b", (8, 2048), GRAPH, ParallelConfig(), 1, 104.0),
    "7b tp2 zero1": ("7b", (2, 8192), EngineConfig(), TP2, 2, 98.6),
    "7b tp2 zero1 graph": ("7b", (2, 8192), GRAPH, TP2, 2, 98.9),
    "7b zero1 full": ("7b", (2, 8192), EngineConfig(recompute="full"), ParallelConfig(), 1, 121.8),
    "7b tp2 zero1 full": ("7b", (2, 8192), EngineConfig(recompute="full"), TP2, 2, 61.0),
    "7b zero3": ("7b", (2, 8192), EngineConfig(zero_stage=3, recompute="selective"), ParallelConfig(), 2, 121.9),
    "7b fsdp2": ("7b", (2, 8192), EngineConfig(name="fsdp2", recompute="selective"), ParallelConfig(), 2, 110.0),
    "7b fsdp2, every second block": (
        *("7b", (2, 8192), EngineConfig(name="fsdp2", recompute="selective", recompute_every=2), ParallelConfig(), 2),
        122.2,
    ),
    "7b tp4 zero1 graph": ("7b", (2, 8192), GRAPH, TP4, 4, 50.1),
    "7b tp2 dp2 zero1 graph": ("7b", (1, 8192), GRAPH, TP2, 4, 59.6),
    "7b zero3 on four": ("7b", (1, 8192), EngineConfig(zero_stage=3, recompute="selective"), ParallelConfig(), 4, 62.6),
    "7b fsdp2 on four": ("7b", (1, 8192), EngineConfig(name="fsdp2", recompute="selective"), ParallelConfig(), 4, 57.4),
    **{
        f"{size}, six layers, tp8 graph": (f"{size}/6", (1, 8192), SLICE, TP8, 8, gib)
        for size, gib in (("13b", 7.2), ("65b", 15.6), ("175b", 31.5))
    },
    "13b fsdp2 on four": ("13b", (1, 8192), EngineConfig(name="fsdp2", recompute="full"), ParallelConfig(), 4, 57.3),
}


@pytest.mark.parametrize("follow", [extrapolated, pytest.param(microbatch, marks=pytest.mark.full)])
@pytest.mark.parametrize(("model", "batch", "engine", "parallel", "world", "gib"), MEASURED.values(), ids=MEASURED)
def test_the_plan_is_within_a_tenth_of_what_a_gpu_took(model, batch, engine, parallel, world, gib, follow):
    """By a few layers, of which test_speed says that they tell of all; in full by all."""
    rows, length = batch
    name, _, layers = model.partition("/")
    whole = from_mapping(ModelConfig, compose_model(name))
    config = dataclasses.replace(
        TrainConfig(),
        model=whole.shortened(int(layers)) if layers else whole,
        engine=engine,
        parallel=parallel,
        data=DataConfig(sequence_length=length, global_batch=rows * world // parallel.tp, micro_batch=rows),
    )
    planned = plan_memory(config, world, follow).reserved / GIB
    print(f"{planned:.1f} GiB planned, {gib} measured: {100 * (planned / gib - 1):+.1f} %")
    assert planned == pytest.approx(gib, rel=0.10)


@pytest.mark.parametrize(("model", "gib"), [("1b", 37.1), ("385m", 23.1)])
def test_the_plan_of_muon_is_within_a_tenth_of_what_a_gpu_took(model, gib):
    config = dataclasses.replace(
        TrainConfig(),
        model=from_mapping(ModelConfig, compose_model(model)),
        engine=GRAPH,
        optim=OptimConfig(name="muon"),
        data=DataConfig(sequence_length=2048, global_batch=8, micro_batch=8),
    )
    assert plan_memory(config, 1, extrapolated).reserved / GIB == pytest.approx(gib, rel=0.10)


def test_zero_divides_over_data_parallel_ranks_alone():
    config = tiny_config(engine=ZERO[3], parallel=ParallelConfig(tp=2))
    one, four = (sum(state_bytes(config, world).values()) for world in (2, 8))
    assert one == pytest.approx(4 * four, rel=1e-3)
    assert one < GIB
