"""Steps that went wrong: what is decided, and which rank and tensor are named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from megatron_tn.config import EngineConfig, GuardConfig, ParallelConfig
from megatron_tn.engine.build import build_engine, initialize_engine
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.training.diagnose import Culprit, find_nonfinite, watching
from megatron_tn.training.guard import Guard, TrainingAborted, spike_height
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport, train_step
from tests.engine.test_nonfinite import BF16
from tests.engine.test_parity import LOCAL, ZERO, name_of
from tests.helpers.models import Rows, random_batch, tiny_config
from tests.helpers.ranks import run_ranks

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
    assert "a fault that does not repeat" in rewind.reason
    state.rewinds = [{"by": "hand"}, {"by": "guard"}]
    with pytest.raises(TrainingAborted, match=r"rewound guard\.max_rewinds=1 times"):
        guard.check(state, report_of(math.nan, applied=False), list)


def diagnose(tp: int, engine_config: EngineConfig, fault: str) -> tuple[bool, list[Culprit], list[bool], bool]:
    """A fault on rank 1: was the update refused, who was found, did anything change, did the next step go well?"""
    context = ParallelContext.create(tp)
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


CASES = [(1, LOCAL), (1, ZERO[0]), (1, ZERO[3]), (1, BF16[1]), (2, ZERO[1])]
MORE = [(tp, engine) for tp in (1, 2) for engine in (LOCAL, *ZERO, *BF16) if (tp, engine) not in CASES]
CASES += [pytest.param(*case, marks=pytest.mark.full) for case in MORE]


@pytest.mark.parametrize(
    ("tp", "engine"), CASES, ids=lambda v: v if isinstance(v, int) else f"{name_of(v)}-{v.precision}"
)
def test_the_rank_and_the_tensor_are_found_and_nothing_is_changed(tp, engine):
    for applied, found, unchanged, next_applied in run_ranks(2, diagnose, tp, engine, "gradient"):
        assert not applied
        assert [(culprit.rank, culprit.tensor) for culprit in found] == [(1, f"the gradient of {WEIGHT}")]
        assert all(unchanged)
        assert next_applied


@pytest.mark.parametrize("engine", [LOCAL, EngineConfig(name="fsdp2", precision="fp32")], ids=lambda e: e.name)
def test_the_first_activation_is_named(engine):
    for applied, found, unchanged, next_applied in run_ranks(2, diagnose, 1, engine, "activation"):
        assert (applied, next_applied) == (False, True)
        assert [(culprit.rank, culprit.tensor) for culprit in found] == [
            (1, "the output of model.layers.1.channel_mixer")
        ]
        assert all(unchanged)


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
    healthy, found = run_ranks(2, watch_sharded)
    assert healthy is None
    assert found[0] == "the gradient of 1.weight"


def test_a_batch_without_target_tokens_says_nothing_of_the_model():
    engine = build_engine(tiny_config(), ParallelContext(), CPU)
    initialize_engine(engine, 0)
    tokens, targets = random_batch(2, 24)
    report = train_step(engine, [Rows(tokens, torch.full_like(targets, -100))], 1e-3, CPU)
    assert (report.tokens, report.applied, report.skipped) == (0, True, True)
    assert math.isnan(report.loss)
    state = TrainingState(recent_losses=[3.0] * 40)
    state.count(report, samples=2)
    assert Guard(GuardConfig(), lambda *_: None).check(state, report, list) is None
    assert (state.step, state.optimizer_step, state.recent_losses) == (1, 1, [3.0] * 40)
