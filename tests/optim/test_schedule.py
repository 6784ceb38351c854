"""Learning rates by hand, and batches that follow each other."""

import re

import pytest

from megatron_tn.config import DataConfig, OptimConfig, ScheduleConfig, TrainConfig
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


def test_the_last_step_has_the_floor_wherever_warm_up_ends():
    assert rates(name="cosine", warmup_steps=9)[-2:] == pytest.approx([1.0, 0.1])
    assert rates(name="cosine", warmup_steps=8)[-2:] == pytest.approx([1.0, 0.1])
    assert rates(name="cosine", steps=1, warmup_steps=0) == [1.0]
    assert rates(name="wsd", decay_fraction=0) == rates(name="constant")
    assert rates(name="wsd", decay_fraction=0.01)[-2:] == pytest.approx([1.0, 0.1])  # one step, not none


def test_a_decay_that_begins_within_the_warm_up_is_refused():
    def problems(**settings) -> list[str]:
        return TrainConfig(schedule=ScheduleConfig(**({"name": "wsd", "steps": 10} | settings))).problems()

    (found,) = problems(warmup_steps=6, decay_fraction=0.5)
    assert "schedule.warmup_steps=6 overlaps the decay of schedule.name=wsd, which begins after step 5" in found
    assert problems(warmup_steps=5, decay_fraction=0.5) == []
    assert problems(warmup_steps=9, decay_fraction=0) == []
    (found,) = problems(warmup_steps=3, decay_fraction=1)
    assert found.endswith("; set schedule.decay_fraction to at most 0.7, or schedule.warmup_steps to at most 0")
    for steps, warmup_steps in ((7, 3), (1000, 1), (10**7, 10**7 - 1)):
        (found,) = problems(steps=steps, warmup_steps=warmup_steps, decay_fraction=1)
        fraction = float(re.search(r"schedule.decay_fraction to at most (\S+),", found)[1])
        assert problems(steps=steps, warmup_steps=warmup_steps, decay_fraction=fraction) == []
    (found,) = problems(warmup_steps=10, decay_fraction=0.5)
    assert "must be below schedule.steps=10" in found
    for name in ("cosine", "constant"):
        (found,) = problems(name=name, warmup_steps=1, decay_fraction=0.5)
        assert f"is a setting of schedule.name=wsd, but schedule.name={name}" in found


def test_constant_after_warm_up():
    assert rates(name="constant") == [0.5] + [1.0] * 9


def test_no_warm_up():
    assert rates(warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize(
    ("ramp", "sizes"),
    [
        ({}, [6] * 10),
        ({"ramp_from": 2, "ramp_increment": 2, "ramp_steps": 5}, [2, 2, 2, 4, 4, 6, 6, 6, 6, 6]),
        ({"ramp_from": 1, "ramp_increment": 1, "ramp_steps": 5}, [1, 2, 3, 4, 5, 6, 6, 6, 6, 6]),
        ({"ramp_from": 3, "ramp_increment": 3, "ramp_steps": 4}, [3, 3, 3, 3, 6, 6, 6, 6, 6, 6]),
    ],
    ids=["constant", "two increments", "one a step", "one increment"],
)
def test_batches_grow_and_follow_each_other(ramp, sizes):
    batches = [batch_of_step(step, 6, ScheduleConfig(**ramp)) for step in range(10)]
    assert [samples for _, samples in batches] == sizes
    assert [first for first, _ in batches] == [sum(sizes[:step]) for step in range(10)]


@pytest.mark.parametrize(
    ("ramp", "problem"),
    [
        ({"ramp_from": 2}, "a batch-size ramp needs both to be at least 1"),
        ({"ramp_increment": 2, "ramp_steps": 9}, "a batch-size ramp needs both to be at least 1"),
        ({"ramp_from": 8, "ramp_increment": 2, "ramp_steps": 9}, "do not lead to data.global_batch=8"),
        ({"ramp_from": 2, "ramp_increment": 4, "ramp_steps": 9}, "do not lead to data.global_batch=8"),
        ({"ramp_from": 2, "ramp_increment": 2, "ramp_steps": 2}, "schedule.ramp_steps=2 is below the 3 increments"),
        ({"ramp_from": 2, "ramp_increment": 2, "ramp_steps": 9, "steps": 9}, "=9 must be below schedule.steps=9"),
        ({"ramp_from": 5, "ramp_increment": 1, "ramp_steps": 9}, "multiples of .* data-parallel size = 2"),
    ],
    ids=lambda p: ",".join(f"{k}={v}" for k, v in p.items()) if isinstance(p, dict) else "",
)
def test_a_ramp_that_does_not_fit_is_named(ramp, problem):
    schedule = ScheduleConfig(**({"warmup_steps": 0} | ramp))
    config = TrainConfig(schedule=schedule, data=DataConfig(global_batch=8, micro_batch=2))
    (found,) = config.problems(world_size=1)
    assert re.search(problem, found)


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
