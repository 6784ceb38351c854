"""The reaction to a non-finite gradient or loss, and to a loss spike.

Every rank decides alone, from the loss and gradient norm reduced over all ranks, so all decide the same without another
collective. The engine refuses a non-finite update. A spike is seen in the loss only after bad updates were applied, so
recovery means loading an earlier checkpoint.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_tn.config import GuardConfig
from megatron_tn.training.diagnose import Culprit
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport


class TrainingAborted(RuntimeError):
    """Raised on every rank when the guard's settings (guard.*) say that the run must end."""


class Rewind(NamedTuple):
    """A request to load the newest checkpoint and skip `batches` from then on. reason: one line."""

    batches: list[int]
    reason: str


@dataclass(frozen=True)
class Guard:
    """Call `check` after every step, on every rank.

    report(line, values, step): prints a line and logs values; called on every rank.
    """

    config: GuardConfig
    report: Callable[[str, dict[str, Any], int], None]

    def check(
        self, state: TrainingState, report: StepReport, diagnose: Callable[[], Sequence[Culprit]]
    ) -> Rewind | None:
        """Check the last step counted in `state`. Returns None to continue, or the rewind to make. diagnose: finds the
        first non-finite tensors; collective; called after a non-finite step.

        Raises:
            TrainingAborted: on every rank.
        """
        if report.skipped:
            return None
        if not report.finite:
            return self._nonfinite(state, report, diagnose())
        state.nonfinite_in_a_row = 0
        height = spike_height(report.loss, state.recent_losses, self.config)
        known = len(state.recent_losses)
        state.recent_losses = [*state.recent_losses, report.loss][-self.config.spike_window :]
        if self.config.spike == "off" or height is None:
            return None
        reason = f"step {state.step}: loss {report.loss:.4f} is {height:.3f} nats above the median of the last {known}"
        return self._act(self.config.spike, state, f"{reason} steps, a spike", "spike")

    def _nonfinite(self, state: TrainingState, report: StepReport, culprits: Sequence[Culprit]) -> Rewind | None:
        state.nonfinite_in_a_row += 1
        where = "; ".join(f"rank {culprit.rank}: {culprit.tensor}" for culprit in culprits)
        where = where or "no tensor in a second run of the batch: a transient fault, perhaps of hardware"
        reason = f"step {state.step}: loss {report.loss}, gradient norm {report.grad_norm}; first not finite: {where}"
        row = state.nonfinite_in_a_row
        if row >= self.config.max_consecutive:
            raise TrainingAborted(
                f"{reason}; {row} steps in a row were not finite (guard.max_consecutive={self.config.max_consecutive})"
            )
        return self._act(self.config.nonfinite, state, reason, "nonfinite")

    def _act(self, action: str, state: TrainingState, reason: str, kind: str) -> Rewind | None:
        reason = f"{reason}; batch {state.step}"
        if action == "abort":
            raise TrainingAborted(f"{reason} (guard.{kind}=abort)")
        self.report(f"{reason} (guard.{kind}={action})", {f"guard/{kind}": reason}, state.step)
        if action != "rewind":
            return None
        if len([one for one in state.rewinds if one["by"] == "guard"]) >= self.config.max_rewinds:
            raise TrainingAborted(f"{reason}; the run was rewound guard.max_rewinds={self.config.max_rewinds} times")
        first = max(state.step - self.config.skip_before, 1)
        return Rewind(list(range(first, state.step + 1)), reason)


def spike_height(loss: float, recent: Sequence[float], config: GuardConfig) -> float | None:
    """loss - median(recent) in nats if it is a spike, else None.

    Spike: loss - median > max(spike_sigmas x sigma, spike_nats), with at least half a window of recent losses.
    """
    if len(recent) < max(config.spike_window // 2, 2):
        return None
    median = statistics.median(recent)
    # 1.4826 x the median absolute deviation is the standard deviation of a normal distribution.
    sigma = 1.4826 * statistics.median(abs(value - median) for value in recent)
    height = loss - median
    threshold = max(config.spike_sigmas * sigma, config.spike_nats)
    return height if height > threshold and math.isfinite(height) else None
