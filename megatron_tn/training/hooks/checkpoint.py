"""Saves a checkpoint every checkpoint.every steps, on a stop signal, and at the end of the run."""

import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from megatron_tn.checkpoint.background import CheckpointWriter, Save
from megatron_tn.training.hooks import Hook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport

WORTH_SAYING_S = 1.0  # seconds that a save waited for the one before it


@dataclass
class CheckpointEvery(Hook):
    """Calls `save(state)` on all ranks. Records the pause of each save at once, and its write when it is on disk.

    prepare: begins to make what the first save needs. save: starts a save with `writer`; returns the previous save if
    not yet reported. report(line, values, step): prints a line once and records values. record(values, step): records
    values. every: steps; 0 saves only on a stop signal and at the end. last: the run's last step, which waits for the
    last write. at_end: whether it saves. abort: whether a failed save ends the run; a failure of a save at the run's
    last step always does.
    """

    writer: CheckpointWriter
    prepare: Callable[[], None]
    save: Callable[[TrainingState], Save | None]
    report: Callable[[str, dict[str, Any], int], None]
    record: Callable[[dict[str, Any], int], None]
    _: KW_ONLY
    every: int
    last: int
    at_end: bool
    abort: bool
    _said: bool = field(default=False, init=False)

    def on_start(self, state: TrainingState) -> None:
        if self.every or (self.at_end and self.last > state.step):
            self.prepare()

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        self._written(self.writer.finished(), state)
        final = report.stop or state.step == self.last
        due = report.stop or (self.at_end and final) or (bool(self.every) and state.step % self.every == 0)
        if due:
            self._written(self.save(state), state)
            self._paused(self.writer.current, state)
        if final:
            began = time.perf_counter()
            if (done := self.writer.wait()) is not None:
                self._record(done, state, {"checkpoint/pause_s": time.perf_counter() - began})
                self._written(done, state, fatal=due)

    def on_stop(self, state: TrainingState) -> None:
        done = self.writer.close()  # a save may be in progress when a step raises
        if done is not None and done.error is not None:
            self.report(str(done.error), {}, state.step)

    def _paused(self, save: Save, state: TrainingState) -> None:
        if save.wait_s > WORTH_SAYING_S and self.every and save.step % self.every == 0 and not self._said:
            self._said = True
            self.report(
                f"the save of step {save.step} waited {save.wait_s:.1f} s for the write of the previous one: "
                f"checkpoint.every={self.every} is less than a write takes; training waits at each such save",
                {},
                state.step,
            )
        self._record(save, state, {"checkpoint/pause_s": save.pause_s, "checkpoint/wait_s": save.wait_s})

    def _written(self, save: Save | None, state: TrainingState, *, fatal: bool = False) -> None:
        if save is None:
            return
        if save.error is not None:
            if fatal or self.abort:
                raise save.error
            self.report(f"{save.error}; training goes on (checkpoint.on_failure=report)", {}, state.step)
        self._record(save, state, {"checkpoint/write_s": save.write_s, "checkpoint/failed": bool(save.error)})

    def _record(self, save: Save, state: TrainingState, values: dict[str, Any]) -> None:
        self.record({"checkpoint/step": save.step} | values, state.step)
