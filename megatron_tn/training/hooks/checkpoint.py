"""When a checkpoint is saved: every checkpoint.every steps, when the run is told to stop, and at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_tn.checkpoint.background import CheckpointWriter, Save
from megatron_tn.training.hooks import NullHook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport


class CheckpointEvery(NullHook):
    """Calls `save(state)` on all ranks, and reports each save once it is on the disk.

    save: begins a save with `writer`; returns the save before it, if that was not reported yet. report(line, values,
    step): prints a line once and records values. record(values, step): records values. every: steps; 0 saves only at a
    stop and at the end. last: the run's last step; 0 for no save at the end. abort: whether a save that fails ends the
    run; the last save of a run that fails always does.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        save: Callable[[TrainingState], Save | None],
        report: Callable[[str, dict[str, Any], int], None],
        record: Callable[[dict[str, Any], int], None],
        *,
        every: int,
        last: int,
        abort: bool,
    ):
        self.writer = writer
        self.save = save
        self.report = report
        self.record = record
        self.every = every
        self.last = last
        self.abort = abort

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        self._report(self.writer.finished(), state)
        due = self.every and state.step % self.every == 0
        final = report.stop or state.step == self.last
        if due or final:
            self._report(self.save(state), state)
        if final:
            self._report(self.writer.wait(), state, fatal=True)

    def on_stop(self, state: TrainingState) -> None:
        done = self.writer.close()  # a save may be under way when a step raised
        if done is not None and done.error is not None:
            self.report(str(done.error), {}, state.step)

    def _report(self, save: Save | None, state: TrainingState, *, fatal: bool = False) -> None:
        if save is None:
            return
        if save.error is not None:
            if fatal or self.abort:
                raise save.error
            self.report(f"{save.error}; training goes on (checkpoint.on_failure=report)", {}, state.step)
        figures = {"step": save.step, "pause_s": save.pause_s, "write_s": save.write_s, "failed": bool(save.error)}
        self.record({f"checkpoint/{name}": value for name, value in figures.items()}, state.step)
