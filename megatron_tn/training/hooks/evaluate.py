"""Held-out loss during training. Leaves the data position and all RNG states unchanged."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tn.training.hooks import Hook
from megatron_tn.training.hooks.figures import TEXTS
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport


class Interrupted(Exception):
    """Raised on every rank within an evaluation after a stop signal."""


@dataclass
class EvaluateEvery(Hook):
    """Calls `evaluate()` on all ranks every `every` steps (0: never) and after step `last`, and `record(values, step)`
    with the held-out figures that it returns, and the seconds that they took."""

    evaluate: Callable[[], dict[str, Any]]
    record: Callable[[dict[str, Any], int], None]
    every: int
    last: int

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if (self.every and state.step % self.every == 0) or state.step == self.last:
            began = time.perf_counter()
            try:
                found = self.evaluate()
            except Interrupted:
                self.record({"evaluation_s": time.perf_counter() - began}, state.step)
                return
            whole = {name: value for name, value in found.items() if "/" not in name and name != TEXTS}
            state.held_out = {"step": state.step, **whole}
            self.record(found | {"evaluation_s": time.perf_counter() - began}, state.step)
