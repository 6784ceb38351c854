"""A hang names its rank, leaves stacks, and ends with a non-zero exit code.

Every rank has a thread that writes every few seconds where the rank is, to run_dir/ranks/START/NNNNN.json: its sign of
life. When a rank has not moved for too long, all are compared. One that gives no sign of life has died or was stopped;
one that is behind the others, or that alone does not wait in a collective, is what the others wait for. Every rank that
can writes its stacks to run_dir/stacks, and exits. Files, because they still answer when the network does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import linecache
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

HANG_EXIT = 75  # exit code of a rank that gave up on a hang
MOST_INTERVAL_S = 5.0  # between two signs of life
BYTES = 4096  # of a sign of life
ORDER = ("start", "data", "step", "save", "evaluate", "stop")  # of phases within a step
# Words at which Python stands when it waits for the GPU, and so for whatever the GPU waits for.
GPU_WAITS = (".item()", ".tolist()", "synchronize(", ".cpu()", ".wait()")


class Progress:
    """Where this rank is, told by the training loop; and how long it has been in each phase, in seconds."""

    def __init__(self) -> None:
        self.step = 0
        self.first_step = 0  # of this process
        self.phase = "start"
        self.since = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)

    def at(self, phase: str, step: int | None = None) -> None:
        """The rank begins `phase` of step number `step`."""
        now = time.monotonic()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now
        self.step = self.step if step is None else step
        if phase == "step":
            self.first_step = self.first_step or self.step

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.at(phase)
        yield
        self.at(before)


class Watchdog:
    """Use as a context manager, on every rank; entering and leaving are not collective, making one is.

    timeout_s: how long a rank may stay in one phase of a step; 0 turns the watchdog off. long_s: the same for what may
    take long: starting, the first step (which compiles), evaluating, a save that waits for the one before, stopping.
    """

    def __init__(self, run_dir: Path, progress: Progress, *, timeout_s: float, long_s: float):
        self.progress = progress
        self.timeout_s = timeout_s
        self.long_s = long_s
        self.interval_s = min(MOST_INTERVAL_S, timeout_s / 6)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.run_dir = run_dir
        self.failure = ""
        self._lost = False  # whether that failure is another rank's: a collective that broke
        self._main = threading.main_thread().ident
        self._count = 0
        self._done = threading.Event()
        self._told = False  # by another rank that it is over
        targets = (self._live, self._watch)
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in targets]
        start = [f"{time.time():.3f}"]
        if self.rank == 0:
            shutil.rmtree(run_dir / "ranks", ignore_errors=True)
            (run_dir / "ranks" / start[0]).mkdir(parents=True)
        if self.size > 1:
            dist.broadcast_object_list(start, src=0)  # ranks of one start find each other, and no earlier one's
        self.folder = run_dir / "ranks" / start[0]

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # kill -USR2 PID prints its stacks
        if self.timeout_s:
            self._write()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(2 * self.interval_s)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)

    def explain(self, error: BaseException) -> str:
        """After this rank failed: which rank failed first, or has died, if another's end is why. Empty when unknown.

        Takes a few seconds when the error came out of a collective.
        """
        self._lost = from_collective(error)  # first: signs of life go on meanwhile
        self.progress.at(self.progress.phase)  # what broke just before it was taken for a hang has its time to explain
        self.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        self._write()
        if not self.timeout_s or self.size == 1 or not self._lost:
            return ""
        signs = self._observe()
        first = [sign for sign in signs.values() if sign["failed"] and not sign["lost"]]
        if first:
            return "; ".join(f"{name_of(sign)} failed: {sign['failed']}" for sign in first)
        dead = "; ".join(f"{who} gives no sign of life: it has died or was stopped" for who in self._silent(signs))
        able = [rank for rank, sign in signs.items() if sign["alive"] or sign["failed"]]
        if 0 not in able and self.rank == min(able):
            self._replace_status(dead)  # rank 0 cannot
        return dead or "all ranks are alive, but the connection between them failed; NCCL_DEBUG=INFO says more"

    def _live(self) -> None:
        """Signs of life. In a thread of its own, so that a file system that does not answer ends no run."""
        while not self._done.wait(self.interval_s):
            self._write()
            self._told = self._report.exists()

    def _watch(self) -> None:
        while True:
            # Should C code hold Python's lock, so that this thread does not get to run again, this ends the process.
            faulthandler.dump_traceback_later(self.timeout_s + self.interval_s, exit=True, file=2)
            if self._done.wait(self.interval_s):
                return
            if self._told or time.monotonic() - self.progress.since > self._limit():
                self._give_up()

    def _limit(self) -> float:
        progress = self.progress
        compiling = progress.phase == "step" and progress.step == progress.first_step
        short = progress.phase in ("data", "step") and not compiling
        # A rank that failed waits for nobody for long, be it a save whose other ranks are gone.
        return self.timeout_s if short or self.failure else self.long_s

    @property
    def _report(self) -> Path:
        return self.folder / "hang.txt"

    def _give_up(self) -> None:
        """One rank compares all and says what it found; every rank leaves its stacks and ends."""
        with contextlib.suppress(OSError):
            stacks = self.run_dir / "stacks"
            stacks.mkdir(exist_ok=True)
            with (stacks / f"rank_{self.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        with contextlib.suppress(OSError):
            # Made by exactly one rank; the others see it and stop as well, so that all leave their stacks.
            descriptor = os.open(self._report, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            text = self._compare()
            os.write(descriptor, text.encode())
            os.close(descriptor)
            shutil.copyfile(self._report, self.run_dir / "hang.txt")
            self._replace_status(text.splitlines()[0])
            print(text, file=sys.stderr, flush=True)
        time.sleep(2 * self.interval_s)  # a launcher kills the others as soon as one rank ends
        os._exit(HANG_EXIT)

    def _compare(self) -> str:
        limit = self._limit()
        head = f"hang: no progress for {limit:.0f} s (hang_timeout_s={self.timeout_s:g}): "
        signs = self._observe()
        where = [f"  {name_of(sign)}: {place_of(sign)}" for _, sign in sorted(signs.items())]
        if silent := self._silent(signs):
            return "\n".join([f"{head}{', '.join(silent)}: no sign of life, it has died or was stopped", *where])
        waited_for = behind(list(signs.values()))
        names = ", ".join(f"{name_of(sign)} ({place_of(sign)})" for sign in waited_for)
        reason = f"the others wait for {names}" if waited_for else "all ranks are at the same place"
        return "\n".join([f"{head}{reason}; stacks are in {self.run_dir / 'stacks'}", *where])

    def _observe(self) -> dict[int, dict[str, Any]]:
        """Every rank's last sign of life; "alive" says whether it gave another while we looked."""
        before = self._read_all()
        for _ in range(3):
            time.sleep(self.interval_s)
            self._write()
        after = self._read_all()
        return {
            rank: sign | {"alive": sign["count"] != before.get(rank, sign)["count"]} for rank, sign in after.items()
        }

    def _silent(self, signs: dict[int, dict[str, Any]]) -> list[str]:
        names = [name_of(sign) for _, sign in sorted(signs.items()) if not sign["alive"] and not sign["failed"]]
        return names + [f"rank {rank}" for rank in range(self.size) if rank not in signs]

    def _read_all(self) -> dict[int, dict[str, Any]]:
        signs = {}
        for rank in range(self.size):
            with contextlib.suppress(OSError, ValueError):  # absent, or being written
                signs[rank] = json.loads((self.folder / f"{rank:05d}.json").read_text())
        return signs

    def _write(self) -> None:
        self._count += 1
        try:
            waiting, place = self._stands_at()
        except Exception as error:  # other threads run on while they are looked at; no sign of life may be lost over it
            waiting, place = False, f"a place that could not be read: {error!r}"
        sign = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "count": self._count,
            "step": self.progress.step,
            "phase": self.progress.phase,
            "place": place[:500],
            "waiting": waiting,
            "failed": self.failure[:1000],
            "lost": self._lost,
        }
        # In place: a network file system shows a changed file at once to who opens it, a replaced one after a while.
        with contextlib.suppress(OSError):
            descriptor = os.open(self.folder / f"{self.rank:05d}.json", os.O_CREAT | os.O_WRONLY, 0o644)
            os.pwrite(descriptor, json.dumps(sign).encode().ljust(BYTES), 0)
            os.close(descriptor)

    def _stands_at(self) -> tuple[bool, str]:
        frames = sys._current_frames()
        waiting, place = where_is(frames[self._main]) if self._main in frames else (False, "")
        # Backward passes on a GPU run in threads that Python did not start.
        started = {thread.ident for thread in threading.enumerate()}
        waiting |= any(where_is(frame)[0] for thread, frame in frames.items() if thread not in started)
        return waiting, place

    def _replace_status(self, error: str) -> None:
        """The rank that writes status.json may be the one that hangs."""
        path = self.run_dir / "status.json"
        with contextlib.suppress(OSError, ValueError):
            values = json.loads(path.read_text()) | {"state": "failed", "time": time.time(), "error": error}
            values["step"] = max(values["step"], self.progress.step - 1)  # steps done
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(values) + "\n")
            partial.replace(path)


def living_run(run_dir: Path) -> str:
    """The first rank of a run that is under way in a folder, by its signs of life; empty when there is none.

    Takes a few seconds where a run on another host ended without saying so.
    """
    status = _read_json(run_dir / "status.json")
    before = {path: _read_json(path) for path in run_dir.glob("ranks/*/00000.json")}
    before = {path: sign for path, sign in before.items() if not _has_ended(sign)}
    if status.get("state") != "running" or not before:
        return ""
    time.sleep(1.5 * MOST_INTERVAL_S)
    for path, sign in before.items():
        after = _read_json(path)
        if after.get("count") != sign.get("count"):
            return name_of(after)
    return ""


def _has_ended(sign: dict[str, Any]) -> bool:
    """Whether a sign of life is that of a process of this host that is no more."""
    if sign.get("host") != socket.gethostname() or not isinstance(sign.get("pid"), int):
        return False
    try:
        os.kill(sign["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def where_is(frame: FrameType) -> tuple[bool, str]:
    """Whether a thread waits in a collective or for the GPU; and the project's line, or the last one, it stands at."""
    waiting, place, own = False, "", Path(__file__).parents[2]
    step: FrameType | None = frame
    while step is not None:
        # A thread that runs on may be between lines: f_lineno is None there.
        path, line = step.f_code.co_filename, step.f_lineno or step.f_code.co_firstlineno
        waiting |= "torch/distributed/distributed_c10d" in path and step.f_code.co_name != "__init__"
        if not place:
            text = linecache.getline(path, line).strip()
            waiting |= any(word in text for word in GPU_WAITS)
            if "site-packages" not in path and Path(path).is_relative_to(own):
                place = f"{Path(path).relative_to(own)}:{line} in {step.f_code.co_name}: {text}"
        step = step.f_back
    return waiting, place


def behind(signs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ranks that the others wait for: those earliest in the run, or else those that do not wait themselves."""
    positions = [(sign["step"], ORDER.index(sign["phase"])) for sign in signs]
    if len(set(positions)) > 1:
        return [sign for sign, position in zip(signs, positions, strict=True) if position == min(positions)]
    found = [sign for sign in signs if not sign["waiting"]]
    return found if len(found) < len(signs) or len(signs) == 1 else []


def from_collective(error: BaseException) -> bool:
    """Whether an error is another process's: a collective that broke or ran out of time."""
    if isinstance(error, dist.DistError):
        return True
    words = ("closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "timed out waiting", "socket")
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and any(word in str(chain).lower() for word in words):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def name_of(sign: dict[str, Any]) -> str:
    return f"rank {sign['rank']} (host {sign['host']}, process {sign['pid']})"


def place_of(sign: dict[str, Any]) -> str:
    doing = "waits at" if sign["waiting"] else "is at"
    seen = "" if sign["alive"] else "last seen in "
    return f"{seen}step {sign['step']}, {sign['phase']}, {doing} {sign['place'] or 'code outside this project'}"
