"""Where a run stands: all that goes on from one process to the next besides parameters and moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_tn.training.step import StepReport


@dataclass
class TrainingState:
    """Counters at a step boundary.

    step: optimizer steps taken or skipped, which is also the next step's number.
    optimizer_step: steps that were applied; what AdamW's bias correction counts.
    tokens: target tokens seen.
    samples: sequences taken from the stream, which is also the next one's index.
    stream: the token stream's state at the last save, as plain JSON values.
    """

    step: int = 0
    optimizer_step: int = 0
    tokens: int = 0
    samples: int = 0
    stream: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, report: StepReport, samples: int) -> None:
        """One more step, over so many sequences on all ranks together."""
        self.step += 1
        self.optimizer_step += int(report.applied)
        self.tokens += report.tokens
        self.samples += samples
