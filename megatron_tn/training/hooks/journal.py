"""log.jsonl: one JSON object a line, a line a step. The truth about a run; every other sink is a copy."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from megatron_tn.training.hooks import NullHook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work


class Journal(NullHook):
    """Writes records on global rank 0. After a resume, later steps of the earlier run are set aside, so that the log is
    one clean curve; they go to log.superseded.jsonl, and nothing is lost."""

    def __init__(self, path: Path, every: int, work: Work):
        self.path = path
        self.every = every
        self.work = work
        self._file = None
        self._tokens = 0
        self._steps = 0

    def on_start(self, state: TrainingState) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._set_aside(state.step)
        self._file = self.path.open("a", buffering=1)
        self._since, self._tokens, self._steps = time.perf_counter(), 0, 0

    def on_rewind(self, state: TrainingState) -> None:
        self._file.close()
        self.on_start(state)

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        self._tokens += report.tokens
        self._steps += 1
        if report.skipped:
            self.write({"step": state.step, "skipped": True, "tokens": state.tokens, "time": time.time()})
            return
        if state.step % self.every and report.applied and not report.stop:
            return
        now = time.perf_counter()
        seconds = now - self._since
        self.write(
            {
                "step": state.step,
                "loss": report.loss,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "applied": report.applied,
                "tokens": state.tokens,
                "samples": state.samples,
                **self.work.rates(self._tokens / seconds),
                "step_seconds": seconds / self._steps,
                "world_size": self.work.processes,
                "time": time.time(),
            }
        )
        self._since, self._tokens, self._steps = now, 0, 0

    def on_stop(self, state: TrainingState) -> None:
        if self._file:
            self._file.close()

    def record(self, values: dict[str, Any], step: int) -> None:
        self.write({"step": step, **values})

    def write(self, record: dict[str, Any]) -> None:
        """Append one record at once. JSON knows no NaN and no infinity: they become null."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")

    def _set_aside(self, step: int) -> None:
        kept, later = [], []
        # Bytes, since a line that a dying host cut short may hold any; all that are written are ASCII.
        content = self.path.read_bytes()
        for line in content.splitlines():
            try:
                (later if json.loads(line)["step"] > step else kept).append(line)
            except (ValueError, KeyError, TypeError):
                later.append(line)  # cut short when its process died
        if not later and content.endswith(b"\n"):
            return
        with self.path.with_name("log.superseded.jsonl").open("ab") as file:
            file.writelines(line + b"\n" for line in later)
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(rewritten, self.path)
