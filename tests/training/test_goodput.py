"""Goodput: every second of the wall time has one cause, whatever ended the starts of a run."""

import time
from collections.abc import Iterator

import pytest

from megatron_tn.training.goodput import account, goodput_of, process_began
from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.throughput import Work
from tests.helpers.steps import REPORT


def start(began: float, step: int = 0, ready: float = 10.0) -> Iterator[dict]:
    yield {"step": step, "start/began": began, "time": began + ready}


def steps(first: int, last: int, begin: float, seconds: float = 1.0, data: float = 0.25, every: int = 1):
    """Records of steps first to last that begin at `begin`, one every so many steps."""
    for step in range(first - 1 + every, last + 1, every):
        end = begin + (step - first + 1) * seconds
        yield {"step": step, "loss": 2.0, "step_seconds": seconds, "data_s": data, "time": end}


def stop(state: str, step: int, moment: float) -> dict:
    return {"step": step, "stop/state": state, "time": moment}


def causes(**wanted: float) -> dict[str, float]:
    return pytest.approx(dict.fromkeys(account(start(0), []).lost_s, 0.0) | wanted)


def check_whole(found) -> None:
    assert found.useful_s + sum(found.lost_s.values()) == pytest.approx(found.wall_s)


@pytest.mark.parametrize("every", [1, 5])
def test_one_start(every):
    first = {"step": every, "loss": 3.0, "step_seconds": (6 + every) / every, "data_s": 0.25, "time": 16.0 + every}
    records = [
        *start(0),
        first,
        *steps(every + 1, 20, begin=16 + every, every=every),
        {"step": 20, "evaluation_s": 3.0, "time": 39.0},
        {"step": 20, "checkpoint/pause_s": 2.0, "time": 41.0},
        stop("finished", 20, 42.0),
    ]
    found = account(records, [])
    # The first step took 7 s: six more than the others.
    assert found.lost_s == causes(startup=10, first_step=6, evaluation=3, checkpoint=2, data=5, other=1)
    assert (found.useful_s, found.wall_s, found.steps, found.starts) == (15, 42, 20, 1)
    assert found.in_words().startswith("35.7% of 42 s in 1 start; lost: start-up 23.8%, first steps 14.3%, waiting for")
    check_whole(found)


def test_a_kill_replays_steps_and_the_gap_is_lost_too():
    superseded = [*steps(11, 15, begin=20), {"step": 15, "checkpoint/pause_s": 0.5, "time": 25.5}]
    kept = [*start(0), *steps(1, 10, begin=10), *start(30.5, step=10), *steps(11, 20, begin=40.5)]
    found = account(kept, superseded)
    assert found.lost_s == causes(startup=20, replayed=5, checkpoint=0.5, data=5, down=5)
    assert (found.useful_s, found.steps, found.starts) == (15, 20, 2)
    check_whole(found)
    # A kill in the midst of setting records aside leaves them twice.
    assert account(kept, [*superseded, *superseded[:3]]) == found
    # A start whose own record was taken back counts as well.
    again = account([*start(0), *steps(1, 10, begin=10), *start(60, step=10)], [*superseded, *start(30.5, step=12)])
    assert (again.starts, again.lost_s["startup"]) == (3, 30)


@pytest.mark.parametrize("every", [1, 5])
def test_what_comes_between_the_journals_start_and_the_first_step_is_start_up(every):
    pause = {"step": 2, "checkpoint/pause_s": 3.0, "time": 65.0}
    later = steps(3, 10, begin=65) if every == 1 else [{**r, "time": r["time"] + 3} for r in steps(1, 10, 60, every=5)]
    early = steps(1, 2, begin=60) if every == 1 else []
    found = account([*start(0), *early, pause, *later], [])
    assert found.lost_s == causes(startup=60, checkpoint=3, data=2.5)
    check_whole(found)


@pytest.mark.parametrize(("state", "down"), [("finished", 0), ("preempted", 1000), ("failed", 1000)])
def test_time_after_a_finished_run_is_nobodys_loss(state, down):
    first = [*start(0), *steps(1, 5, begin=10), stop(state, 5, 15.0)]
    first.append({"step": 5, **account(first, []).values(), "time": 15.0})
    found = account([*first, *start(1015, step=5), *steps(6, 9, begin=1025)], [])
    assert found.lost_s["down"] == down
    assert found.wall_s == 29 + down
    check_whole(found)


def test_a_rewind_inside_a_start():
    rewind = {"step": 3, "rewind/from": 6, "time": 18.0}
    found = account([*start(0), *steps(1, 3, begin=10), rewind, *steps(4, 9, begin=18)], [*steps(4, 6, begin=13)])
    assert found.lost_s == causes(startup=10, replayed=3, data=2.25, other=2)
    assert found.steps == 9
    check_whole(found)


@pytest.mark.parametrize("back", [5, 30, 3600])
@pytest.mark.parametrize("at", [5, 10, 25], ids=["start-up", "steps", "more steps"])
def test_a_clock_that_is_set_back_makes_no_second_negative_and_no_share_above_1(back, at):
    written = [*start(0), *steps(1, 30, begin=10), stop("finished", 30, 40.0)]
    found = account([r | {"time": r["time"] - back * (r["time"] > at)} for r in written], [])
    assert min(found.lost_s.values()) >= 0
    assert 0 <= found.share <= 1
    check_whole(found)


def test_journals_from_before_starts_were_recorded():
    assert account(steps(1, 5, begin=10), []) is None
    found = account([*steps(1, 5, begin=10), *start(30, step=5), *steps(6, 9, begin=40)], [])
    assert (found.steps, found.wall_s) == (4, 14)


def test_a_runs_journal_has_what_is_needed(tmp_path):
    work, folder, waited = Work(1, 1, None), RunFolder(tmp_path), 0.0
    began = process_began()
    assert 0 < time.time() - began < 3600

    def train(last: int, state: TrainingState) -> None:
        nonlocal waited
        journal = Journal(folder.journal, StepFigures(work, 2, lambda: waited), began=time.time() - 5)
        journal.on_start(state)
        while state.step < last:
            time.sleep(0.01)
            waited += 0.005
            state.count(REPORT, samples=1)
            journal.on_step(state, REPORT)
        journal.file.close()

    train(6, TrainingState())
    train(8, TrainingState(step=4))
    found = goodput_of(folder)
    assert (found.starts, found.steps) == (2, 8)
    assert found.lost_s["startup"] == pytest.approx(10, abs=0.5)
    assert found.lost_s["data"] == pytest.approx(8 * 0.005)
    assert found.lost_s["replayed"] >= 2 * 0.01
    assert found.useful_s == pytest.approx(8 * 0.01 - 8 * 0.005, abs=0.05)
