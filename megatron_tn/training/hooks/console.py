"""Progress on standard output: on a terminal a bar, elsewhere a line every ten seconds, with loss, held-out loss,
learning rate, speed, utilisation (where the GPU's datasheet rate is known) and time left.

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

from megatron_tn.training.hooks import Hook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work

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


class ConsoleProgress(Hook):
    def __init__(self, total_steps: int, work: Work):
        self.total = total_steps
        self.work = work
        self.gone = False
        self._console = Console(markup=False)
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._last_line = 0.0

    @while_it_is_there
    def on_start(self, state: TrainingState) -> None:
        self._task = self._progress.add_task("", total=self.total, completed=state.step, figures="")
        if self._console.is_terminal:
            self._progress.start()
        self._restart_clocks(state)

    @while_it_is_there
    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if report.skipped:
            why = "it has no target tokens" if report.empty else "data.skip_batches or a rewind says so"
            self._console.print(f"step {state.step}: its batch is skipped: {why}")
            return
        now, tick = time.perf_counter(), self.work.clock.now()
        figures = self._figures(state, report, tick - self._tick)
        self._tick = tick
        if self._console.is_terminal:
            self._progress.update(self._task, completed=state.step, figures=figures)
        elif now - self._last_line > LINE_EVERY_S or state.step == self.total:
            self._last_line = now
            left = (now - self._began) / (state.step - self._first) * (self.total - state.step)
            print(f"step {state.step}/{self.total}  {figures}  {left:.0f} s left", flush=True)
        if not report.applied:
            self._console.print(
                f"step {state.step}: gradient norm is {report.grad_norm}: the update was skipped", style="bold red"
            )

    def on_rewind(self, state: TrainingState) -> None:
        self._restart_clocks(state)

    def _restart_clocks(self, state: TrainingState) -> None:
        self._began, self._tick, self._first = time.perf_counter(), self.work.clock.now(), state.step

    def _figures(self, state: TrainingState, report: StepReport, seconds: float) -> str:
        rates = self.work.rates(report.tokens / seconds)
        found = [f"loss {report.loss:.3f}"]
        if "heldout_loss" in state.held_out:
            found.append(f"held-out {state.held_out['heldout_loss']:.3f}")
        found += [f"lr {report.lr:.2e}", f"{rates['tokens_per_second']:,.0f} tokens/s"]
        if "utilisation" in rates:
            found.append(f"{rates['utilisation']:.0%} of peak")
        return "  ".join(found)

    @while_it_is_there
    def on_stop(self, state: TrainingState) -> None:
        self._progress.stop()
