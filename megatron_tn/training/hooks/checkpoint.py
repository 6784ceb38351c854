"""Saves: every so many steps, when told to stop, and at the end."""

from __future__ import annotations

from collections.abc import Callable

from megatron_tn.training.hooks import NullHook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport


class CheckpointEvery(NullHook):
    """Calls `save(state)` on all ranks. every: steps; 0 leaves only the stop and the end. last: the run's last step,
    0 for no save at the end."""

    def __init__(self, save: Callable[[TrainingState], object], every: int, last: int):
        self.save = save
        self.every = every
        self.last = last

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        due = self.every and state.step % self.every == 0
        if due or report.stop or state.step == self.last:
            self.save(state)
