"""The figures of a training step, as the journal records them and its copies show them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work

TEXTS = "texts"  # key of a record with generated texts: [{"prompt": ..., "text": ...}]


@dataclass
class StepFigures:
    """Counts tokens and seconds between records. every: steps between records; a skipped step, a step whose update was
    refused, the last one before a stop, and steps of which also(step) is true have a record in any case. waited_s:
    seconds that rank 0 has waited for data so far."""

    work: Work
    every: int = 1
    waited_s: Callable[[], float] = lambda: 0.0
    also: Callable[[int], bool] = lambda _: False

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._waited, self._tokens, self._steps = self.work.clock.now(), self.waited_s(), 0, 0

    def of(self, state: TrainingState, report: StepReport) -> dict[str, Any] | None:
        """The record of the step that `state` counts, without its number; None where no record is due."""
        self._tokens += report.tokens
        self._steps += 1
        counts = {"steps_without_update": state.step - state.optimizer_step, "time": time.time()}
        if report.skipped:
            return {"skipped": True, "tokens": state.tokens, **counts}
        due = state.step % self.every == 0 or self.also(state.step)
        if not due and report.applied and not report.stop:
            return None
        tokens, steps, before, waited = self._tokens, self._steps, self._since, self._waited
        self.restart()
        seconds = self._since - before
        return {
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "applied": report.applied,
            "tokens": state.tokens,
            "samples": state.samples,
            **self.work.rates(tokens / seconds),
            "step_seconds": seconds / steps,
            "data_s": (self._waited - waited) / steps,
            "world_size": self.work.processes,
            **counts,
        }


def shown(record: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by name, and what a dashboard shows besides: perplexities, exp(nats a token), and
    tokens per second and process."""
    found = {name: value for name, value in record.items() if isinstance(value, int | float) and math.isfinite(value)}
    for loss, perplexity in (("loss", "perplexity"), ("heldout_loss", "heldout_perplexity")):
        if found.get(loss, math.inf) < 700:  # exp(710) is above the largest double
            found[perplexity] = math.exp(found[loss])
    if found.get("world_size") and "tokens_per_second" in found:
        found["tokens_per_second_per_gpu"] = found["tokens_per_second"] / found["world_size"]
    return found
