"""Learning rates by hand, and batches that follow each other."""

from __future__ import annotations

import pytest

from megatron_tn.config import OptimConfig, ScheduleConfig
from megatron_tn.optim.groups import is_decayed
from megatron_tn.optim.schedule import batch_of_step, learning_rate

OPTIM = OptimConfig(lr=1.0)


def rates(**settings) -> list[float]:
    schedule = ScheduleConfig(**({"steps": 10, "warmup_steps": 2, "min_lr_ratio": 0.1} | settings))
    return [learning_rate(step, OPTIM, schedule) for step in range(schedule.steps)]


def test_cosine():
    found = rates(name="cosine")
    assert found[:3] == [0.5, 1.0, 1.0]
    assert found[-1] == pytest.approx(0.1)
    assert found[2:] == sorted(found[2:], reverse=True)
    # Half way from step 2 to step 9 the cosine stands half way between peak and floor.
    half = (learning_rate(5, OPTIM, ScheduleConfig(steps=9, warmup_steps=2)),)
    assert half[0] == pytest.approx((1 + 0.1) / 2)


def test_warm_up_stable_decay():
    found = rates(name="wsd", decay_fraction=0.3)
    assert found[1:7] == [1.0] * 6
    assert found[7:] == pytest.approx([0.1 + 0.9 * 2 / 3, 0.1 + 0.9 / 3, 0.1])


def test_constant_after_warm_up():
    assert rates(name="constant") == [0.5] + [1.0] * 9


def test_no_warm_up():
    assert rates(warmup_steps=0)[0] == 1.0


def test_batches_follow_each_other():
    ends = [sum(batch_of_step(step, 6)) for step in range(4)]
    assert [batch_of_step(step, 6)[0] for step in range(1, 5)] == ends


@pytest.mark.parametrize(
    ("name", "dimensions", "decayed"),
    [
        ("model.embed_tokens.weight", 2, True),
        ("model.layers.0.token_mixer.qkvu_proj.weight", 2, True),
        ("model.layers.0.token_mixer.lrpe.theta", 3, False),
        ("model.final_norm.weight", 1, False),
    ],
)
def test_matrices_alone_are_decayed(name, dimensions, decayed):
    assert is_decayed(name, dimensions) is decayed
