"""torch.profiler over a few steps: a Chrome trace, and a table of operators and kernels by time."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from megatron_tn.config import replacing
from megatron_tn.training.hooks import Hook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport

log = logging.getLogger(__name__)

ROWS = 80  # rows of the operator table


class Profile(Hook):
    """Profiles `steps` steps on this rank, after the process's first `skip` steps, and writes to `folder`:

    steps_A_to_B.trace.json.gz   for chrome://tracing or ui.perfetto.dev
    steps_A_to_B.txt             operators and kernels, the longest first

    The step before the first profiled one warms up the profiler. Profiled steps are slower, with the same losses.
    """

    def __init__(self, folder: Path, skip: int, steps: int):
        self.folder = folder
        self.skip = skip
        self.steps = steps
        self._running: profile | None = None

    def on_start(self, state: TrainingState) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._last = state.step
        self._running = profile(
            activities=activities,
            schedule=schedule(wait=max(self.skip - 1, 0), warmup=min(self.skip, 1), active=self.steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._first = state.step + self.skip + 1
        self._running.start()

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if self._running is None:
            return
        self._last = state.step
        self._running.step()
        if state.step >= self._first + self.steps - 1:
            self.on_stop(state)

    def on_stop(self, state: TrainingState) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.stop()
            if self._last < self._first:
                log.warning(
                    "no profile: this start ended with step %d, before step %d; lower logging.profile_skip=%d",
                    *(self._last, self._first, self.skip),
                )

    def _write(self, found: profile) -> None:
        name = f"steps_{self._first}_to_{self._last}"
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=80)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (trace := self.folder / f"{name}.trace.json.gz").unlink(missing_ok=True)
            found.export_chrome_trace(str(trace))
            with replacing(self.folder / f"{name}.txt") as file:
                file.write(table + "\n")
        except OSError as error:
            log.warning("profile %s cannot be written: %s", self.folder / name, error.strerror)
