"""Hooks: code that runs between training steps, one concern per file. A hook never changes a step's results."""

from typing import Any

from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport


class Hook:
    """Does nothing; hooks override what they need."""

    def on_start(self, state: TrainingState) -> None:
        """Before the first step of this process; `state.step` steps are done already."""

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        """After a step, which `state` already counts."""

    def on_rewind(self, state: TrainingState) -> None:
        """After a rewind: steps after `state.step` will be repeated. `on_step` is not called for the step that caused
        the rewind."""

    def on_stop(self, state: TrainingState) -> None:
        """After the last step of this process, also when it stops early or fails."""


class Sink(Hook):
    """A hook that also records named values: the journal, or a copy of it. On global rank 0."""

    def record(self, values: dict[str, Any], step: int) -> None:
        raise NotImplementedError
