"""Table of faults: how each is brought about in a running start, and how that start must end."""

import os
import random
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.soak import agent
from megatron_tn.training.run_folder import RunFolder


@dataclass(frozen=True)
class Target:
    """A run's folder, its trainers as rank -> PID, and the source of random choices, such as of a rank."""

    folder: RunFolder
    pids: Mapping[int, int]
    choice: random.Random

    def signal_one(self, number: int) -> None:
        os.kill(self.pids[self.choice.choice(sorted(self.pids))], number)

    def signal_all(self, number: int) -> None:
        for pid in self.pids.values():
            os.kill(pid, number)


@dataclass(frozen=True)
class Fault:
    """inject: brings the fault about. ends: the exit codes with which it may end the start; empty where training must
    go on. heal: takes the fault back, where training goes on. checkpoints: how many whole ones the run must have for
    it. in_training: whether it needs trainers that train, and does not come during start-up."""

    inject: Callable[[Target], None]
    ends: tuple[int, ...] = ()
    heal: Callable[[Target], None] | None = None
    checkpoints: int = 0
    in_training: bool = True


def signalled(number: int) -> Callable[[Target], None]:
    """The `inject` that sends signal `number` to a randomly chosen rank."""
    return lambda target: target.signal_one(number)


def damage(target: Target) -> None:
    """Cut a file of the newest checkpoint short, as a file system does that lost its last writes, or flip a bit in it;
    then a rank dies."""
    newest = target.folder.whole_checkpoints()[-1]
    path = target.choice.choice(sorted(newest.glob("*.safetensors")))
    middle = path.stat().st_size // 2
    if target.choice.random() < 0.5:
        os.truncate(path, middle)
    else:
        with path.open("r+b") as file:
            file.seek(middle)
            byte = file.read(1)[0]
            file.seek(middle)
            file.write(bytes([byte ^ 1]))
    target.signal_one(signal.SIGKILL)


def limit_files(target: Target, size: int) -> None:
    """No file of the trainers can grow beyond `size` bytes: their write() fails, as on a full disk. Needs no root."""
    for pid in target.pids.values():
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def read_only(target: Target) -> None:
    limit_files(target, 0)
    target.signal_all(agent.READ_ONLY)


def read_write(target: Target) -> None:
    limit_files(target, -1)
    target.signal_all(agent.READ_WRITE)


# A peer's broken connection may be noticed first (1), and of a hang either side (75 by the watchdog; 1 by the timer of
# faulthandler). 128 + n: ended by signal n.
DIED = (1, 128 + signal.SIGKILL)
FAULTS = {
    "kill": Fault(signalled(signal.SIGKILL), DIED, in_training=False),
    "segv": Fault(signalled(signal.SIGSEGV), (1, 128 + signal.SIGSEGV), in_training=False),
    "term": Fault(signalled(signal.SIGTERM), (0,)),
    "exception": Fault(signalled(agent.RAISE), (1,)),
    "stop": Fault(signalled(signal.SIGSTOP), (1, 75, *DIED)),
    "lock": Fault(signalled(agent.HOLD_LOCK), (1, 75)),
    "abort": Fault(signalled(agent.CUT), (1,)),
    "damage": Fault(damage, DIED, checkpoints=2),
    "disk": Fault(lambda target: limit_files(target, 0), heal=lambda target: limit_files(target, -1)),
    "readonly": Fault(read_only, heal=read_write),
}
# On a GPU. NCCL's own thread may find the lost context first, and abort.
GPU_FAULTS = {
    "cuda": Fault(signalled(agent.CUDA_ERROR), (1, 75, 128 + signal.SIGABRT), checkpoints=1),
    "memory": Fault(signalled(agent.OUT_OF_MEMORY), (1, 75), checkpoints=1),
}


def trainers_of(run_dir: Path | str) -> dict[int, int]:
    """rank -> PID of the processes on this machine that train in `run_dir`; their data readers are left out."""
    found: dict[int, tuple[int, int]] = {}  # PID -> (rank, parent)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "megatron_tn.train" not in words or f"run_dir={run_dir}" not in words:
                continue
            variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        rank = next((word.removeprefix("RANK=") for word in variables if word.startswith("RANK=")), "")
        if rank.isdecimal():
            found[int(process.name)] = (int(rank), parent)
    return {rank: pid for pid, (rank, parent) in found.items() if parent not in found}
