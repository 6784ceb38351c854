"""Progress on standard output: a bar with loss, speed and time left on a terminal, else a line every ten seconds.

When writing to standard output fails, training continues; log.jsonl holds all records.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_tn.training.hooks import NullHook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


def while_it_is_there(method: Callable[..., None]) -> Callable[..., None]:
    """Decorator of ConsoleProgress methods: after a failed write to standard output, the method does nothing."""

    @functools.wraps(method)
    def guarded(self: ConsoleProgress, *arguments: Any) -> None:
        if self.gone:
            return
        try:
            method(self, *arguments)
        except (OSError, SystemExit) as error:  # rich raises SystemExit when a pipe is closed
            self.gone = True
            log.warning("progress cannot be printed: %r; training goes on (log.jsonl has everything)", error)

    return guarded


class ConsoleProgress(NullHook):
    def __init__(self, total_steps: int):
        self.total = total_steps
        self.gone = False
        self._console = Console()
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._last_line = 0.0

    @while_it_is_there
    def on_start(self, state: TrainingState) -> None:
        self._task = self._progress.add_task("", total=self.total, completed=state.step, loss=float("nan"), speed=0.0)
        if self._console.is_terminal:
            self._progress.start()
        self._began = self._tick = time.perf_counter()
        self._first = state.step

    @while_it_is_there
    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if report.skipped:
            why = "it has no target tokens" if report.empty else "data.skip_batches or a rewind says so"
            self._console.print(f"step {state.step}: its batch is skipped: {why}")
            return
        now = time.perf_counter()
        speed = report.tokens / (now - self._tick)
        self._tick = now
        if self._console.is_terminal:
            self._progress.update(self._task, completed=state.step, loss=report.loss, speed=speed)
        elif now - self._last_line > LINE_EVERY_S or state.step == self.total:
            self._last_line = now
            left = (now - self._began) / (state.step - self._first) * (self.total - state.step)
            print(
                f"step {state.step}/{self.total}  loss {report.loss:.3f}  {speed:,.0f} tokens/s  {left:.0f} s left",
                flush=True,
            )
        if not report.applied:
            self._console.print(
                f"step {state.step}: gradient norm is {report.grad_norm}: the update was skipped", style="bold red"
            )

    def on_rewind(self, state: TrainingState) -> None:
        self._began = self._tick = time.perf_counter()
        self._first = state.step

    @while_it_is_there
    def on_stop(self, state: TrainingState) -> None:
        self._progress.stop()
