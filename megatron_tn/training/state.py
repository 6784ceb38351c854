"""Training state in a checkpoint besides parameters, moments and RNG states: counters and lists."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict

from megatron_tn.config import from_mapping
from megatron_tn.training.step import StepReport


@dataclass
class Ledger:
    """skip: sorted numbers of skipped batches, past and future. rewinds: oldest first, each
    {"from": step, "to": step, "skip": batches, "by": "guard" | "hand" | "damage", "reason": text}."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    skip: list[int] = field(default_factory=list)
    rewinds: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class TrainingState:
    """Counters at a step boundary.

    step: optimizer steps taken or skipped. The next step, number step + 1 in the journal, trains on batch step + 1.
    optimizer_step: updates that were applied; AdamW's bias correction counts these.
    tokens: target tokens of all trained batches, including batches whose update was refused.
    samples: sequences taken from the stream so far; also the index of the next one.
    stream: the token stream's state at the last save, as plain JSON values.
    skip, rewinds: see `Ledger`; kept over resumes.
    recent_losses: losses of the last guard.spike_window steps, oldest first, the reference for loss spikes.
    nonfinite_in_a_row: consecutive non-finite steps.
    held_out: the last held-out figures, and the "step" of their evaluation.
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
        return self.step + 1 in self.skip

    def add_skip(self, batches: Iterable[int]) -> None:
        self.skip = sorted({*self.skip, *batches})

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.skip, self.rewinds)

    def add_ledger(self, ledger: Ledger) -> None:
        """Add the skips and rewinds noted after this state was saved."""
        self.add_skip(ledger.skip)
        self.rewinds = [*self.rewinds, *(note for note in ledger.rewinds if note not in self.rewinds)]

    def note_rewind(self, *, start: int, batches: list[int], by: str, reason: str) -> None:
        """Append to `rewinds` a rewind from step `start` to `self.step`."""
        note = {"from": start, "to": self.step, "skip": batches, "by": by, "reason": reason}
        self.rewinds = [*self.rewinds, note]

    def become(self, other: TrainingState) -> None:
        """Overwrite every field with the other state's; references to this object stay valid."""
        vars(self).update(vars(other))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingState:
        """Raises ConfigError when `values` are not a training state."""
        return from_mapping(cls, values)

    def count(self, report: StepReport, samples: int) -> None:
        """Count one more step. samples: sequences in the global batch."""
        self.step += 1
        self.optimizer_step += int(report.applied)
        self.tokens += report.tokens
        self.samples += samples
