"""Steps that went wrong: what is decided, and which rank and tensor are named."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_tn.config import EngineConfig, GuardConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.training.diagnose import Culprit, find_nonfinite, watching
from megatron_tn.training.guard import Guard, TrainingAborted, spike_height
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport, train_step
from tests.engine.test_nonfinite import BF16
from tests.engine.test_parity import LOCAL, ZERO
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import layout, run_shared

CPU = torch.device("cpu")
WEIGHT = "model.layers.1.channel_mixer.l1.weight"


def report_of(loss: float, applied: bool = True) -> StepReport:
    return StepReport(
        loss=loss, tokens=10, lr=1e-3, grad_norm=1.0 if applied else math.nan, applied=applied, stop=False
    )


def run_guard(losses: list[float], **settings) -> tuple[list[int], TrainingState, list[dict]]:
    """Steps at which a rewind is asked for, the state afterwards, and what was recorded."""
    records, state, rewinds = [], TrainingState(), []
    report = lambda line, values, step: records.append({"step": step, "line": line, **values})  # noqa: E731
    guard = Guard(GuardConfig(**settings), report)
    for loss in losses:
        step = report_of(loss, applied=math.isfinite(loss))
        state.count(step, samples=1)
        if guard.check(state, step, lambda: [Culprit(3, "the gradient of w", 7)]):
            rewinds.append(state.step)
    return rewinds, state, records


def test_a_spike_is_far_above_what_came_before_and_noise_is_not():
    noise = [3 + 0.02 * math.sin(7 * step) for step in range(64)]
    config = GuardConfig(spike_window=64, spike_sigmas=6, spike_nats=0.3)
    assert spike_height(max(noise), noise, config) is None
    assert spike_height(3.25, noise, config) is None  # many sigmas, few nats
    assert spike_height(4.0, noise, config) == pytest.approx(1.0, abs=0.05)
    assert spike_height(4.0, noise[:31], config) is None  # too little is known
    wild = [3 + (step % 7) / 3 for step in range(64)]
    assert spike_height(5.5, wild, config) is None  # nats, but no more than this run always swings


@pytest.mark.parametrize(("policy", "rewinds"), [("off", []), ("report", []), ("rewind", [41])])
def test_a_spike_is_recorded_and_acted_on_as_configured(policy, rewinds):
    losses = [4 - step / 40 for step in range(40)] + [9.0, 3.0]
    found, state, records = run_guard(losses, spike=policy, spike_window=32)
    assert found == rewinds
    assert [record["step"] for record in records] == ([] if policy == "off" else [41])
    assert state.recent_losses == losses[-32:]


def test_a_spike_can_end_the_run():
    with pytest.raises(TrainingAborted, match=r"step 41: loss 9\.0000 is .* a spike; batch 41 \(guard.spike=abort\)"):
        run_guard([3.0] * 40 + [9.0], spike="abort", spike_window=32)


def test_a_loss_that_has_moved_for_good_is_not_a_spike_for_ever():
    _, _, records = run_guard([3.0] * 40 + [5.0] * 40, spike="report", spike_window=32)
    assert 41 in [record["step"] for record in records]
    assert records[-1]["step"] <= 41 + 16


def test_one_line_names_step_rank_tensor_and_batch():
    _, _, records = run_guard([3.0, math.nan, 3.0])
    (line,) = [record["line"] for record in records]
    for part in ("step 2", "rank 3", "the gradient of w", "batch 2", "guard.nonfinite=skip"):
        assert part in line


def test_so_many_in_a_row_abort_and_others_do_not():
    run_guard([3.0, math.nan, math.nan] * 5, max_consecutive=3)
    with pytest.raises(TrainingAborted, match=r"3 steps in a row were not finite \(guard.max_consecutive=3\)"):
        run_guard([3.0, *[math.nan] * 3], max_consecutive=3)


def test_rewinds_are_bounded_and_skip_what_they_are_told_to():
    state = TrainingState(step=41)
    guard = Guard(GuardConfig(nonfinite="rewind", skip_before=2, max_rewinds=1), lambda *_: None)
    rewind = guard.check(state, report_of(math.nan, applied=False), list)
    assert rewind.batches == [39, 40, 41]
    assert "a transient fault" in rewind.reason
    state.rewinds = [{"by": "hand"}, {"by": "guard"}]
    with pytest.raises(TrainingAborted, match=r"rewound guard\.max_rewinds=1 times"):
        guard.check(state, report_of(math.nan, applied=False), list)


def diagnose(tp: int, engine_config: EngineConfig, fault: str) -> tuple[bool, list[Culprit], list[bool], bool]:
    """A fault on rank 1: was the update refused, who was found, did anything change, did the next step go well?"""
    context = layout(tp)
    config = tiny_config(engine=engine_config, parallel=ParallelConfig(tp=tp))
    engine = build_engine(config, context, CPU)
    initialize_engine(engine, 3)
    tokens, targets = random_batch(4, 16)
    batches = [Rows(tokens[:2], targets[:2]), Rows(tokens[2:], targets[2:])]
    train_step(engine, batches, 1e-2, CPU)
    before = [value.clone() for owned in engine.owned_ranges() for value in owned.values.values()]
    handle = None
    if context.rank == 1 and fault == "gradient":
        handle = dict(engine.model.named_parameters())[WEIGHT].register_hook(lambda gradient: gradient * math.nan)
    elif context.rank == 1 and fault == "activation":
        mixer = engine.model.model.layers[1].channel_mixer
        handle = mixer.register_forward_hook(lambda module, inputs, output: output * math.inf)
    report = train_step(engine, batches, 1e-2, CPU)
    found = find_nonfinite(engine, batches, CPU)
    if handle:
        handle.remove()
    again = find_nonfinite(engine, batches, CPU)
    after = [value for owned in engine.owned_ranges() for value in owned.values.values()]
    unchanged = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert again == []
    return report.applied, found, unchanged, train_step(engine, batches, 1e-2, CPU).applied


def diagnose_each(cases: list[tuple[int, EngineConfig, str]]) -> list[tuple[bool, list[Culprit], list[bool], bool]]:
    return [diagnose(*case) for case in cases]


FSDP2 = EngineConfig(name="fsdp2", precision="fp32")
FP8 = dataclasses.replace(BF16[1], products="fp8")  # frees the weights that are looked at
COVERING = [(1, LOCAL), (1, ZERO[0]), (1, ZERO[3]), (1, FP8), (2, ZERO[1])]
GRADIENTS = [(tp, engine, "gradient") for tp, engine in COVERING]
ACTIVATIONS = [(1, LOCAL, "activation"), (1, FSDP2, "activation")]
MORE = [(tp, engine, "gradient") for tp in (1, 2) for engine in (LOCAL, *ZERO, *BF16)]
TENSORS = {"gradient": f"the gradient of {WEIGHT}", "activation": "the output of model.layers.1.channel_mixer"}


@pytest.mark.parametrize(
    "cases", [[*GRADIENTS, *ACTIVATIONS], pytest.param(MORE, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_the_rank_and_the_first_tensor_are_found_and_nothing_is_changed(cases):
    for found_here in run_shared(2, diagnose_each, cases):
        for case, (applied, found, unchanged, next_applied) in zip(cases, found_here, strict=True):
            assert (applied, next_applied) == (False, True), case
            assert [(culprit.rank, culprit.tensor) for culprit in found] == [(1, TENSORS[case[-1]])], case
            assert all(unchanged), case


def watch_sharded() -> tuple[str, int] | None:
    """A weight's gradient on rank 1 is not finite, in a model whose parameters FSDP2 shards."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if dist.get_rank() == 1:

        def poison(module, inputs) -> None:
            module.weight.register_hook(lambda gradient: gradient * math.nan)

        model[1].register_forward_pre_hook(poison)
    with watching(model) as watch:
        model(torch.randn(4, 8)).sum().backward()
    return watch.found


def test_parameters_that_fsdp2_swaps_in_are_watched():
    healthy, found = run_shared(2, watch_sharded)
    assert healthy is None
    assert found[0] == "the gradient of 1.weight"


def step_without_targets(engine_config: EngineConfig) -> None:
    """A step, a step without target tokens, then one in which only one of the two ranks has some."""
    context = layout()
    engine = build_engine(tiny_config(engine=engine_config), context, CPU)
    initialize_engine(engine, 0)
    tokens, targets = random_batch(2, 24)
    nothing = torch.full_like(targets, -100)
    state = TrainingState()

    def take(wanted: torch.Tensor) -> StepReport:
        report = train_step(engine, [Rows(tokens, wanted)], 1e-2, CPU)
        state.count(report, samples=2)
        return report

    def values() -> list[torch.Tensor]:
        return [value.clone() for owned in engine.owned_ranges() for value in owned.values.values()]

    take(targets)
    before = values()
    report = take(nothing)
    assert (report.tokens, report.applied, report.skipped, report.empty) == (0, False, True, True)
    assert math.isnan(report.loss)
    assert all(torch.equal(a, b) for a, b in zip(before, values(), strict=True))
    assert (state.step, state.optimizer_step) == (2, 1)
    assert Guard(GuardConfig(), lambda *_: None).check(state, report, list) is None
    assert state.recent_losses == []
    report = take(nothing if context.rank == 0 else targets)
    assert (report.tokens, report.applied, report.skipped) == (int((targets != -100).sum()), True, False)
    assert not all(torch.equal(a, b) for a, b in zip(before, values(), strict=True))


def step_without_targets_in_every_engine() -> None:
    for engine in (LOCAL, *ZERO[1:], FSDP2, BF16[1]):
        step_without_targets(engine)


def test_a_batch_without_target_tokens_changes_nothing():
    run_shared(2, step_without_targets_in_every_engine)
