"""From all ranks' signs of life: silent ranks, ranks that others wait for, ranks that failed first. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_tn.training.watchdog.signs import Sign

PHASES = ("start", "data", "step", "save", "evaluate", "stop")  # in the order of a step
# Parts of gloo's and NCCL's messages about a lost peer.
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
    """Two readings of all ranks' signs, each rank -> sign. size: world size.

    A live rank writes a new sign between the two.
    """

    before: Mapping[int, Sign]
    after: Mapping[int, Sign]
    size: int

    @property
    def signs(self) -> list[Sign]:
        """The signs of the later reading, by rank."""
        return [self.after[rank] for rank in sorted(self.after)]

    def is_alive(self, sign: Sign) -> bool:
        before = self.before.get(sign.rank)
        return before is not None and before.count != sign.count

    @property
    def silent(self) -> list[str]:
        """Names of ranks with no new sign in the later reading and no error: dead or stopped."""
        quiet = [sign.name for sign in self.signs if not self.is_alive(sign) and not sign.failed]
        return quiet + [f"rank {rank}" for rank in range(self.size) if rank not in self.after]

    @property
    def failed_first(self) -> list[Sign]:
        """Signs of ranks whose error is their own, not a broken collective."""
        return [sign for sign in self.signs if sign.failed and not sign.lost]

    @property
    def rank_0_can_write(self) -> bool:
        """Whether rank 0 is alive, or exits with an error, and so writes status.json itself."""
        sign = self.after.get(0)
        return sign is not None and (self.is_alive(sign) or bool(sign.failed))


def waited_for(signs: Sequence[Sign]) -> list[Sign]:
    """The ranks that the others wait for: those earliest in the run, or, if all are equal, those not waiting."""
    positions = [(sign.step, PHASES.index(sign.phase)) for sign in signs]
    if len(set(positions)) > 1:
        return [sign for sign, position in zip(signs, positions, strict=True) if position == min(positions)]
    found = [sign for sign in signs if not sign.waiting]
    return found if len(found) < len(signs) or len(signs) == 1 else []


def patience_s(phase: str, *, first_step: bool, failed: bool, timeout_s: float, long_s: float) -> float:
    """Seconds that a rank may stay in a phase before the watchdog calls it a hang.

    first_step: whether this is the process's first step, which compiles. failed: whether the rank already has an error:
    then it waits only briefly, even in a save.
    """
    short = phase == "data" or (phase == "step" and not first_step)
    return timeout_s if short or failed else long_s


def from_collective(error: BaseException) -> bool:
    """Whether an error was caused by another process: a collective that broke or timed out."""
    if isinstance(error, dist.DistError):
        return True
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and any(word in str(chain).lower() for word in LOST_PEER):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
