"""Messages about an observed hang or failure."""

from megatron_tn.training.watchdog.detect import Observation, waited_for
from megatron_tn.training.watchdog.signs import Sign


def explain_failure(seen: Observation) -> str:
    """One line: the ranks whose failure or death broke the others' collectives."""
    if first := seen.failed_first:
        return "; ".join(f"{sign.name} failed: {sign.failed}" for sign in first)
    dead = "; ".join(f"{name} gives no sign of life: it has died or was stopped" for name in seen.silent)
    return dead or "all ranks are alive, but the connection between them failed; NCCL_DEBUG=INFO says more"


def explain_hang(seen: Observation, *, limit_s: float, timeout_s: float, stacks: str) -> str:
    """First line: the ranks that the others wait for. Further lines: each rank's phase and source line.

    limit_s: seconds without progress. stacks: folder of the stack dumps.
    """
    head = f"hang: no progress for {limit_s:.0f} s (hang_timeout_s={timeout_s:g}): "
    where = [f"  {sign.name}: {place_of(sign, seen.is_alive(sign))}" for sign in seen.signs]
    if silent := seen.silent:
        return "\n".join([f"{head}{', '.join(silent)}: no sign of life, it has died or was stopped", *where])
    found = waited_for(seen.signs)
    names = ", ".join(f"{sign.name} ({place_of(sign, seen.is_alive(sign))})" for sign in found)
    reason = f"the others wait for {names}" if found else "all ranks are at the same place"
    return "\n".join([f"{head}{reason}; stacks are in {stacks}", *where])


def place_of(sign: Sign, alive: bool) -> str:
    doing = "waits at" if sign.waiting else "is at"
    seen = "" if alive else "last seen in "
    return f"{seen}step {sign.step}, {sign.phase}, {doing} {sign.place or 'code outside this project'}"
