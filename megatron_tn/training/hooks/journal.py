"""log.jsonl: one JSON object per line, one line per step. The primary log of a run; other sinks are copies."""

import logging
import time
from collections import deque
from typing import Any

from megatron_tn.training.hooks import Sink
from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.journal_file import JournalFile
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport

log = logging.getLogger(__name__)

MOST_WAITING = 100_000  # records buffered while writes fail; the oldest are dropped first


class Journal(Sink):
    """Writes records on global rank 0. After a resume or a rewind, records of later steps move to
    log.superseded.jsonl, so that log.jsonl is one curve and nothing is lost.

    Logging never stops training: while writes fail, records are buffered in memory, with one warning at the first
    failure and a line when they are written.

    figures: which steps have a record, and what is in it. began: Unix time at which this start began: of its process
    or, for a later job of a sweep, of the end of the job before. None records no start.
    """

    def __init__(self, file: JournalFile, figures: StepFigures, *, began: float | None = None):
        self.file = file
        self.figures = figures
        self.began = began
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0
        self._take_back: int | None = None  # move records after this step, once writes work
        self._failed = False  # whether the failure was reported

    def on_start(self, state: TrainingState) -> None:
        self._go_on_from(state)
        if self.began is not None:
            self.record({"start/began": self.began}, state.step)

    def on_rewind(self, state: TrainingState) -> None:
        self._go_on_from(state)

    def _go_on_from(self, state: TrainingState) -> None:
        self._waiting = deque(record for record in self._waiting if record["step"] <= state.step)
        self._take_back = state.step
        self._write()
        self.figures.restart()

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if values := self.figures.of(state, report):
            self.write({"step": state.step, **values})

    def on_stop(self, state: TrainingState) -> None:
        self._write()
        if self._waiting:
            log.error("%s: %d records could not be written", self.file.path, len(self._waiting) + self._lost)
        self.file.close()

    def record(self, values: dict[str, Any], step: int) -> None:
        self.write({"step": step, **values, "time": time.time()})

    def write(self, record: dict[str, Any]) -> None:
        """Append one record now or, if the write fails, buffer it for the next."""
        self._waiting.append(record)
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._write()

    def _write(self) -> None:
        try:
            if self._take_back is not None:
                self.file.set_aside_after(self._take_back)
                self._take_back = None
            while self._waiting:
                for _ in range(self.file.append(list(self._waiting))):
                    self._waiting.popleft()
        except OSError as error:
            if not self._failed:
                log.error("%s cannot be written: %s; training goes on", self.file.path, error.strerror)
            self._failed = True
            return
        if self._failed:
            log.warning("%s can be written again; %d records are lost", self.file.path, self._lost)
            self._failed = False
            self._lost = 0
