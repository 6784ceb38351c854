"""engine.products=fp8: every engine and layout against one process, evaluation, resuming, and what is not finite."""

import dataclasses
import re
from unittest import mock

import pytest
import torch

from megatron_tn.config import ConfigError, DataConfig, EngineConfig, ParallelConfig
from megatron_tn.engine import freed_weights
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.float8_layers import layer_groups, marked_layers
from megatron_tn.precision import fp8 as float8
from megatron_tn.precision.fp8 import OPERAND, quantized
from megatron_tn.training.preflight import problems_before_start
from megatron_tn.training.step import train_step
from tests.engine.test_parity import ALL_PARTITIONED, FSDP2, LOCAL, ZERO
from tests.helpers.gradients import step_gradients
from tests.helpers.models import TINY, Rows, random_batch, reference_gradients, relative_errors, tiny_config
from tests.helpers.ranks import layout, run_shared

SEED, LENGTH, BATCH = 7, 23, 4
# Of a gradient, relative in norm. fp8 rounds x and W by up to 1/16, dy by up to 1/8, in every layer.
FROM_FP64 = 0.2
# Other sums round other numbers up; what fp8 adds to them is then another draw of the same errors.
FROM_ANOTHER_LAYOUT = 0.1


def fp8(engine: EngineConfig, **changes) -> EngineConfig:
    return dataclasses.replace(engine, products="fp8", **changes)


# Each engine, and the microbatches of a rank.
CASES = [
    (fp8(LOCAL), 2),
    (fp8(ZERO[0], recompute="selective"), 1),
    (fp8(ZERO[1]), 2),
    (fp8(ZERO[2]), 1),
    (fp8(ALL_PARTITIONED, recompute="full"), 2),
    (fp8(FSDP2, recompute="selective"), 1),
]
Gradients = dict[str, torch.Tensor]


def gradients_of(
    tp: int, sequence_parallel: bool, cases: list[tuple[EngineConfig, int]], chunk_tokens: int | None = None
) -> list[Gradients]:
    context = layout(tp, 1, sequence_parallel)
    found = []
    for engine_config, microbatches in cases:
        micro = BATCH // context.dp.size // microbatches
        config = tiny_config(
            engine=engine_config,
            parallel=ParallelConfig(tp=tp, sequence_parallel=sequence_parallel),
            data=DataConfig(sequence_length=LENGTH, global_batch=BATCH, micro_batch=micro),
        )
        engine, gradients = step_gradients(config, context, SEED, chunk_tokens)
        found.append(gradients)
        engine.step(1e-3)
        if engine_config.keeps_weights:
            assert_operands_are_of_the_weights(engine)
    return found


def assert_operands_are_of_the_weights(engine: Engine) -> None:
    """Bit for bit, of those that the masters of all ranks make."""
    with engine.whole_weights():
        for group in layer_groups(marked_layers(engine.model)):
            weight = torch.cat([layer.weight.detach() for layer in group])
            for kept, wanted in zip(group[0].float8.kept, quantized(weight, OPERAND), strict=True):
                if not isinstance(kept, torch.Tensor) or kept.numel():  # the transpose is not always kept
                    assert torch.equal(*(torch.as_tensor(each).view(torch.uint8) for each in (kept, wanted)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_gradients_of_every_layout(device):
    """Against one process: data-parallel ranks that see the same microbatches make the same numbers."""
    _, exact = reference_gradients(TINY, SEED, *random_batch(BATCH, LENGTH))
    sizes = (4, 2, 1)
    alone = [(fp8(LOCAL), BATCH // size) for size in sizes]
    one = dict(zip(sizes, run_shared(1, gradients_of, 1, False, alone, device=device)[0], strict=True))
    for gradients in one.values():
        assert max(relative_errors(gradients, exact).values()) < FROM_FP64
    split = [CASES[index] for index in (0, 2, 4, 5)]
    for tp, sequence_parallel, chunk, cases in (
        (1, False, None, CASES),
        (2, False, None, split[:1]),
        (2, True, 2, split),
    ):
        for rank in run_shared(2, gradients_of, tp, sequence_parallel, cases, chunk, device=device):
            for (engine, microbatches), gradients in zip(cases, rank, strict=True):
                wanted = one[BATCH * tp // 2 // microbatches]
                bound = 1e-6 if tp == 1 else FROM_ANOTHER_LAYOUT
                assert max(relative_errors(gradients, wanted).values()) < bound, (tp, engine)
                assert max(relative_errors(gradients, exact).values()) < FROM_FP64, (tp, engine)


def built(engine: EngineConfig) -> Engine:
    built = build_engine(tiny_config(engine=engine), ParallelContext(), torch.device("cpu"))
    initialize_engine(built, SEED)
    return built


def steps(engine: Engine, count: int, first: int = 0) -> list[float]:
    """Losses of steps on rows that count upwards, which a model can learn."""
    losses = []
    for step in range(first, first + count):
        start = torch.randint(0, 101, (8, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(25)) % 101
        rows = Rows(ids[:, :-1], ids[:, 1:])
        losses.append(train_step(engine, [rows], 3e-3, torch.device("cpu")).loss)
    return losses


def test_operands_are_not_searched():
    """Kernels that write them note the largest elements; what the final norm's gradient brings is searched."""
    engine = built(fp8(LOCAL, precision="bf16"))
    with mock.patch.object(float8, "largest", side_effect=float8.largest) as search:
        steps(engine, 1)
    assert search.call_count == 1


def test_a_run_ends_within_a_bound_of_fp32s_loss():
    wanted, found = (steps(built(engine), 40)[-1] for engine in (LOCAL, fp8(LOCAL)))
    assert wanted < 0.5
    assert abs(found - wanted) < 0.02


def test_evaluation_is_in_the_computing_type():
    tokens, targets = random_batch(2, LENGTH)
    with torch.no_grad():
        wanted, found = (built(engine).model.loss(tokens, targets) for engine in (LOCAL, fp8(LOCAL)))
    assert torch.equal(found, wanted)
    assert not torch.equal(built(fp8(LOCAL)).model.loss(tokens, targets), wanted)


def blocks_storage(engine: Engine) -> int:
    """Bytes that the blocks' matrices have in the computing type."""
    storages = [layer.weight.untyped_storage() for layer in marked_layers(engine.model)]
    return sum({storage._cdata: storage.size() for storage in storages}.values())


@pytest.mark.parametrize("changes", [{}, {"recompute": "full"}], ids=str)
def test_weights_are_kept_in_fp8_alone(changes, monkeypatch):
    """bf16 weights exist within `whole_weights`, where evaluation is bf16's; steps before and after are the same, as
    with weights that are made and quantised group by group."""
    local = dataclasses.replace(LOCAL, precision="bf16")
    engine = built(fp8(local, **changes))
    assert len(engine.update.float8.buckets) == 1
    monkeypatch.setattr(freed_weights, "PORTION_BYTES", 0)
    undisturbed = built(fp8(local, **changes))
    assert len(undisturbed.update.float8.buckets) == len(layer_groups(marked_layers(engine.model)))
    tokens, targets = random_batch(2, LENGTH)
    assert blocks_storage(engine) == 0
    with engine.whole_weights(), torch.no_grad():
        assert torch.equal(engine.model.loss(tokens, targets), built(local).model.loss(tokens, targets))
        assert blocks_storage(engine) > 0
    assert blocks_storage(engine) == 0
    assert steps(engine, 2) == steps(undisturbed, 2)
    with pytest.raises(RuntimeError, match=r"run the pass within Engine\.whole_weights"), torch.no_grad():
        engine.model.loss(tokens, targets)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_same(precision):
    """Scales are of current values, so masters and moments are all of the state."""
    config = fp8(LOCAL, precision=precision)
    first, second = built(config), built(config)
    steps(first, 2)
    for there, here in zip(first.owned_ranges(), second.owned_ranges(), strict=True):
        for kind, values in there.values.items():
            here.values[kind].copy_(values)
    second.refresh(optimizer_step=2)
    assert steps(second, 2, first=2) == steps(first, 2, first=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_activations_skips_the_step(value):
    """Infinity, which the cast to fp8 would make its largest number."""
    engine = built(fp8(LOCAL))

    def poison(module, inputs, output):
        x, normed = output
        normed = normed.clone()
        normed[0, 3, 5] = value
        return x, normed

    hook = engine.model.blocks[1].channel_norm.register_forward_hook(poison)
    before = [owned.values["param"].clone() for owned in engine.owned_ranges()]
    tokens, targets = random_batch(2, LENGTH)
    report = train_step(engine, [Rows(tokens, targets)], 1e-2, torch.device("cpu"))
    assert not report.applied
    assert all(torch.equal(a, b.values["param"]) for a, b in zip(before, engine.owned_ranges(), strict=True))
    hook.remove()
    assert train_step(engine, [Rows(tokens, targets)], 1e-2, torch.device("cpu")).applied


def test_an_older_gpu_is_refused_by_name_before_a_run_writes_anything():
    refusal = "engine.products=fp8 needs a GPU of compute capability 9.0 (Hopper) or later, and this one has 8.9"
    config = tiny_config(engine=fp8(LOCAL))
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "device_count", return_value=1),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 9)),
    ):
        assert [line for line in problems_before_start(config, 1, None) if line.startswith(refusal)]
        assert problems_before_start(config, 1, None, gpus=True) == []  # a job's machine may have another
        with pytest.raises(ConfigError, match=re.escape(refusal)):
            build_engine(config, ParallelContext(), torch.device("cuda"))
    (problem,) = tiny_config(engine=fp8(LOCAL, compile="blocks")).problems(1)
    assert problem.startswith("engine.products=fp8 does not go with engine.compile=blocks")
