"""What the signs of all ranks say: who is silent, whom the others wait for, who failed first. No files, no clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_tn.training.watchdog.signs import Sign

PHASES = ("start", "data", "step", "save", "evaluate", "stop")  # in their order within a step
# In messages of gloo and NCCL about a peer that has gone.
LOST_PEER = (
    "closed by peer",
    "connection reset",
    "broken pipe",
    "gloo",
    "nccl",
    "timed out waiting",
    "socket",
)


@dataclass(frozen=True)
class Observation:
    """The signs of all ranks, twice: rank -> sign. size: of the world.

    Between the two a rank that lives gave another sign.
    """

    before: Mapping[int, Sign]
    after: Mapping[int, Sign]
    size: int

    @property
    def signs(self) -> list[Sign]:
        """The later ones, by rank."""
        return [self.after[rank] for rank in sorted(self.after)]

    def is_alive(self, sign: Sign) -> bool:
        before = self.before.get(sign.rank)
        return before is not None and before.count != sign.count

    @property
    def silent(self) -> list[str]:
        """Names of ranks that gave no sign in between, and did not say that they failed: dead or stopped."""
        quiet = [sign.name for sign in self.signs if not self.is_alive(sign) and not sign.failed]
        return quiet + [f"rank {rank}" for rank in range(self.size) if rank not in self.after]

    @property
    def failed_first(self) -> list[Sign]:
        """Those whose error is their own."""
        return [sign for sign in self.signs if sign.failed and not sign.lost]

    @property
    def rank_0_can_write(self) -> bool:
        """Whether rank 0 runs, or fails in good order, and so writes status.json itself."""
        sign = self.after.get(0)
        return sign is not None and (self.is_alive(sign) or bool(sign.failed))


def waited_for(signs: Sequence[Sign]) -> list[Sign]:
    """The ranks that the others wait for: those earliest in the run, or else those that do not wait themselves."""
    positions = [(sign.step, PHASES.index(sign.phase)) for sign in signs]
    if len(set(positions)) > 1:
        return [sign for sign, position in zip(signs, positions, strict=True) if position == min(positions)]
    found = [sign for sign in signs if not sign.waiting]
    return found if len(found) < len(signs) or len(signs) == 1 else []


def patience_s(phase: str, *, first_step: bool, failed: bool, timeout_s: float, long_s: float) -> float:
    """How long a rank may stay in a phase before it takes that for a hang.

    first_step: whether the step under way is the process's first, which compiles. failed: whether the rank has an error
    already: it then waits for nobody for long, be it a save whose other ranks are gone.
    """
    short = phase == "data" or (phase == "step" and not first_step)
    return timeout_s if short or failed else long_s


def from_collective(error: BaseException) -> bool:
    """Whether an error is another process's: a collective that broke or ran out of time."""
    if isinstance(error, dist.DistError):
        return True
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and any(word in str(chain).lower() for word in LOST_PEER):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
