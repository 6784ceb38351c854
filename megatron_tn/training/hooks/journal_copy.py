"""A copy of the journal for another program, such as wandb and TensorBoard."""

import logging
from bisect import bisect_right
from typing import Any

from megatron_tn.training.hooks import Sink
from megatron_tn.training.hooks.figures import TEXTS, StepFigures, shown
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport

log = logging.getLogger(__name__)


class JournalCopy(Sink):
    """Shows the journal's records as they come, and at every start those that the other program lacks: after a kill,
    records that were in its memory alone; the whole journal where it cannot forget the steps that a rewind took back.

    The copy never stops training: its first failure ends it, with one warning. Derived classes say where it goes, by
    `open`, `show` and `close`. name: in messages.
    """

    name: str

    def __init__(self, folder: RunFolder, figures: StepFigures):
        self.folder = folder
        self.figures = figures
        self._is_open = False
        self._told = 0
        self._began: list[float] = []  # of all starts
        self._starts = 0  # of the run, until the record that was shown last

    def open(self, state: TrainingState) -> int:
        """Begin at `state.step`; returns the last step that the other program has already."""
        raise NotImplementedError

    def show(self, values: dict[str, float], texts: list[dict[str, str]], step: int) -> None:
        """values: as `shown` returns them. texts: generated ones, [{"prompt": ..., "text": ...}]."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def catch_up(self, state: TrainingState) -> None:
        """Open the copy and show what the other program lacks, up to `state.step`. Raises what that program raises."""
        self._began, self._starts = self.folder.starts(), 0
        self._told = self.open(state)
        for record in self.folder.records():
            step = record.pop("step")
            if isinstance(step, int) and step <= state.step:
                self._show(record, step)

    def on_start(self, state: TrainingState) -> None:
        self.figures.restart()
        try:
            self.catch_up(state)
            self._is_open = True
        except Exception as error:
            self._give_up(error)

    def on_rewind(self, state: TrainingState) -> None:
        self.on_stop(state)
        self.on_start(state)

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if values := self.figures.of(state, report):
            self.record(values, state.step)

    def record(self, values: dict[str, Any], step: int) -> None:
        if not self._is_open:
            return
        try:
            self._show(values, step)
        except Exception as error:
            self._give_up(error)

    def _show(self, values: dict[str, Any], step: int) -> None:
        if "start/began" in values:
            self._starts = max(self._starts + 1, bisect_right(self._began, values["start/began"]))
        if "loss" in values and self._starts:
            values = values | {"starts": self._starts}
        if step > self._told:
            self.show(shown(values), values.get(TEXTS, []), step)

    def on_stop(self, state: TrainingState) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            self.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "%s: %s: %s; going on without it (log.jsonl has everything)", self.name, type(error).__name__, error
        )
        self._is_open = False
