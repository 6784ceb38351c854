"""Where a run stands: all that goes on from one process to the next besides parameters and moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict

from megatron_tn.config import from_mapping
from megatron_tn.training.step import StepReport


@dataclass
class TrainingState:
    """Counters at a step boundary.

    step: optimizer steps taken or skipped. The next step, number step + 1 in the log, trains on batch number step + 1.
    optimizer_step: steps that were applied; what AdamW's bias correction counts.
    tokens: target tokens seen, also by updates that were refused.
    samples: sequences taken from the stream, which is also the next one's index.
    stream: the token stream's state at the last save, as plain JSON values.
    skip: numbers of batches that are not trained on, past and to come. The ledger that every resume goes on with.
    rewinds: what was rewound: {"from", "to": steps, "skip": batches, "reason"}.
    recent_losses: of the last steps, oldest first; what a loss spike is measured against.
    nonfinite_in_a_row: steps.
    held_out: the last held-out figures, and the "step" they were measured at.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int = 0
    optimizer_step: int = 0
    tokens: int = 0
    samples: int = 0
    stream: dict[str, Any] = field(default_factory=dict)
    skip: list[int] = field(default_factory=list)
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    nonfinite_in_a_row: int = 0
    held_out: dict[str, Any] = field(default_factory=dict)

    @property
    def skips_next(self) -> bool:
        """Whether the next step's batch is one that is not trained on."""
        return self.step + 1 in self.skip

    def add_skip(self, batches: Iterable[int]) -> None:
        self.skip = sorted({*self.skip, *batches})

    def become(self, other: TrainingState) -> None:
        """Take over another state in place: whoever holds this one sees it."""
        vars(self).update(vars(other))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingState:
        """Raises ConfigError when these are not the counters of a run."""
        return from_mapping(cls, values)

    def count(self, report: StepReport, samples: int) -> None:
        """One more step, over so many sequences on all ranks together."""
        self.step += 1
        self.optimizer_step += int(report.applied)
        self.tokens += report.tokens
        self.samples += samples
