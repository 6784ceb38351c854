"""One soak: starts of the trainers, faults at random times, and the outcome of each start."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launch.soak.check import outcome_of, problems
from launch.soak.faults import FAULTS, GPU_FAULTS, Fault, Target, trainers_of
from megatron_tn.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
AGENT = Path(__file__).with_name("site")
KNOWN = FAULTS | GPU_FAULTS
POLL_S = 0.2


class Trainers(Protocol):
    """One start of the trainers."""

    def pids(self) -> Mapping[int, int]:
        """rank -> PID of the trainers that have begun."""

    def exit_code(self) -> int | None:
        """The exit code of the launcher; None while it runs."""

    def kill(self) -> None:
        """End all trainers at once."""


class LocalTrainers:
    """Through launch/local.sh, in a session of its own, with the agent in every trainer."""

    def __init__(self, processes: int, folder: Path, overrides: Sequence[str], log: Path):
        self.folder = folder
        path = os.pathsep.join(filter(None, (str(AGENT), str(ROOT), os.environ.get("PYTHONPATH"))))
        # A pipe to the log: trainers whose files cannot grow can still say so.
        with log.open("a") as file:
            copy = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file, start_new_session=True)
        self._process = subprocess.Popen(
            [ROOT / "launch/local.sh", "-n", str(processes), *overrides, f"run_dir={folder}"],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=copy.stdin,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        copy.stdin.close()

    def pids(self) -> Mapping[int, int]:
        return trainers_of(self.folder)

    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pid in self.pids().values():  # torchrun gives each of them a session of its own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass
class Event:
    """An injected fault. at_s: seconds since the soak began. step: the run's last step by status.json. code: exit code
    of the start that it ended; None where training went on. took_s: seconds from the fault until the start ended, or
    was healed."""

    fault: str
    at_s: float
    step: int
    code: int | None = None
    took_s: float = 0.0


@dataclass
class Soak:
    """folder: of the run under faults. start(folder, more overrides): starts trainers. processes: their number.
    patience_s: a start must train its first step, and end after a fault that ends one, within this. say: prints a line.
    """

    folder: RunFolder
    start: Callable[[Path, Sequence[str]], Trainers]
    processes: int
    mtbf_s: float
    kinds: Sequence[str]
    heal_s: float
    choice: random.Random
    patience_s: float = 300.0
    say: Callable[[str], None] = print
    events: list[Event] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Train under faults until `is_over()`, then tell the trainers to stop."""
        self._began = time.time()
        going_on = True
        while going_on and not self.problems:
            launched, trainers = time.time(), self.start(self.folder.path, ())
            try:
                if self._is_left_over(is_over, trainers, launched):
                    self._stop(trainers, launched)
                    going_on = False
            finally:
                trainers.kill()

    def compare(self, reference: RunFolder) -> None:
        """Train as many steps without faults in another folder, and note what differs."""
        wanted = self.folder.status().get("step", 0)
        self.say(f"{wanted} steps without faults in {reference}")
        trainers = self.start(reference.path, (f"stop_after={wanted}",))
        try:
            while trainers.exit_code() is None:
                time.sleep(POLL_S)
        finally:
            trainers.kill()
        if trainers.exit_code():
            self.problems.append(f"the undisturbed run ended with exit code {trainers.exit_code()}; see its log")
        else:
            self.problems += problems(outcome_of(self.folder), outcome_of(reference))

    def _is_left_over(self, is_over: Callable[[], bool], trainers: Trainers, launched: float) -> bool:
        """Inject faults until one ends this start (False) or the soak is over (True)."""
        while not self.problems:
            at = time.time() + self.choice.expovariate(1 / self.mtbf_s)
            name = self.choice.choice(self.kinds)
            while time.time() < at or not self._is_possible(KNOWN[name], trainers, launched):
                if not self._goes_on(trainers, launched):
                    return False
                if is_over():
                    return True
                time.sleep(POLL_S)
            if self._inject(name, trainers) is not None:
                return False
        return False

    def _goes_on(self, trainers: Trainers, launched: float) -> bool:
        """Whether a start without a fault is well; if not, notes a problem."""
        if trainers.exit_code() is not None:
            self.problems.append(f"a start ended with exit code {trainers.exit_code()} without a fault")
        elif time.time() - launched > self.patience_s and not self._trains_since(launched):
            self.problems.append(f"a start trained no step within {self.patience_s:.0f} s")
        return not self.problems

    def _is_possible(self, fault: Fault, trainers: Trainers, launched: float) -> bool:
        if len(trainers.pids()) < self.processes or len(self.folder.whole_checkpoints()) < fault.checkpoints:
            return False
        return not fault.in_training or self._trains_since(launched)

    def _trains_since(self, launched: float) -> bool:
        """Whether a start after `launched` has taken a step: one of the journal's last records says so, but not always
        the very last, which an evaluation or a save may have written."""
        last = reversed(self.folder.journal.tail(1 << 14))
        return next((record["time"] > launched for record in last if "loss" in record), False)

    def _inject(self, name: str, trainers: Trainers) -> int | None:
        """Inject a fault; returns the exit code of the start if it ended."""
        fault, target = KNOWN[name], Target(self.folder, trainers.pids(), self.choice)
        event = Event(name, time.time() - self._began, self.folder.status().get("step", 0))
        self.events.append(event)
        self.say(f"{event.at_s:8.1f} s: {name}")
        fault.inject(target)
        code = event.code = self._wait(trainers, self.patience_s if fault.ends else self.heal_s)
        event.took_s = time.time() - self._began - event.at_s
        if fault.ends and code not in fault.ends:
            how = f"had not ended {self.patience_s:.0f} s later" if code is None else f"ended with exit code {code}"
            self.problems.append(f"{name}: the start {how}; wanted: {fault.ends}")
        elif not fault.ends and code is not None:
            self.problems.append(f"{name} ended a start, with exit code {code}")
        elif not fault.ends:
            fault.heal(target)
        return code

    def _stop(self, trainers: Trainers, launched: float) -> None:
        while not self._trains_since(launched) and self._goes_on(trainers, launched):
            time.sleep(POLL_S)
        if trainers.exit_code() is None:
            os.kill(trainers.pids()[0], signal.SIGTERM)
        if (code := self._wait(trainers, self.patience_s)) != 0:
            self.problems.append(f"told to stop at the end, the trainers ended with exit code {code}")

    def _wait(self, trainers: Trainers, seconds: float) -> int | None:
        """The exit code of the start; None if it still runs after `seconds`."""
        until = time.time() + seconds
        while trainers.exit_code() is None and time.time() < until:
            time.sleep(POLL_S)
        return trainers.exit_code()
