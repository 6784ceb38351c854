"""Hooks: code that runs around the training steps, one concern a file. A hook never changes what a step computes."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport


class Hook(Protocol):
    def on_start(self, state: TrainingState) -> None:
        """Before the first step of this process; `state.step` steps are done already."""

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        """After a step; `state` counts it."""

    def on_rewind(self, state: TrainingState) -> None:
        """The run went back: steps after `state.step` will be taken again. `on_step` is not called for the step that
        made it go back."""

    def on_stop(self, state: TrainingState) -> None:
        """After the last step of this process, also when it stops early or fails."""


class Sink(Hook, Protocol):
    """A hook that also takes named values: the journal, or a copy of it. On global rank 0."""

    def record(self, values: dict[str, Any], step: int) -> None: ...


class NullHook:
    """Does nothing; hooks derive from it and override what they need."""

    def on_start(self, state: TrainingState) -> None: ...

    def on_step(self, state: TrainingState, report: StepReport) -> None: ...

    def on_rewind(self, state: TrainingState) -> None: ...

    def on_stop(self, state: TrainingState) -> None: ...
