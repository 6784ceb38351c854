"""Straggler report: each rank's forward time, wait for data and memory.

Ranks wait for each other, so a step takes equally long on all. Each rank therefore times its own work, the forward
passes and the wait for data, and every logging.ranks_every steps one small all-gather on the CPU shows the slow ranks.
Where the forward pass contains collectives (tensor parallel, ZeRO 3, FSDP2), a slow rank slows its whole group, and
the report shows the group.
"""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_tn.engine.base import Engine
from megatron_tn.parallel.world import of_all
from megatron_tn.planning.estimate import GIB
from megatron_tn.training.hooks import Hook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.watchdog import Progress

SLOW = 1.2  # a rank above SLOW x the median is reported


@dataclass
class RankReport(Hook):
    """On all ranks. report(line, values, step): prints a line once and records values. record(values, step): records
    values. every: steps between reports."""

    engine: Engine
    progress: Progress
    report: Callable[[str, dict[str, Any], int], None]
    record: Callable[[dict[str, Any], int], None]
    every: int
    # Times or CUDA events: start, end, start, end, ... of forward passes.
    _marks: list[Any] = field(default_factory=list, init=False)

    def on_start(self, state: TrainingState) -> None:
        self.hosts = of_all(socket.gethostname())
        # engine.compile=blocks compiles only the blocks, so hooks of the outermost module still run.
        self._handles = [
            self.engine.model.register_forward_pre_hook(lambda *_: self._mark()),
            self.engine.model.register_forward_hook(lambda *_: self._mark()),
        ]
        # CUDA graph replays run no hooks: their marks enclose the replay of forward and backward.
        if passes := getattr(self.engine, "passes", None):
            passes.watchers.append(self._mark)
        self._begin(state)

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        # The host has read this step's loss, so all events of the step are complete.
        self._forward_s += _seconds_between(self._marks)
        self._marks.clear()
        if state.step % self.every == 0:
            self._tell(state)
            self._begin(state)

    def on_rewind(self, state: TrainingState) -> None:
        self._begin(state)

    def on_stop(self, state: TrainingState) -> None:
        for handle in self._handles:
            handle.remove()

    def _mark(self) -> None:
        if not torch.is_grad_enabled():
            return  # an evaluation
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _begin(self, state: TrainingState) -> None:
        self._first, self._forward_s, self._data_s = state.step, 0.0, self.progress.seconds["data"]
        self._marks.clear()

    def _tell(self, state: TrainingState) -> None:
        steps = max(state.step - self._first, 1)
        on_gpu = torch.cuda.is_available()
        mine = [
            self._forward_s / steps,
            (self.progress.seconds["data"] - self._data_s) / steps,
            torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0,
            torch.cuda.max_memory_reserved() / GIB if on_gpu else 0.0,
        ]
        everyone = [torch.tensor(mine, dtype=torch.float64) for _ in self.hosts]
        if len(everyone) > 1:
            dist.all_gather(everyone, everyone[0].clone())  # by gloo, without a wait for the GPU
        forward, data, allocated, reserved = (values.tolist() for values in torch.stack(everyone).unbind(1))
        values: dict[str, Any] = {}
        lines = []
        for name, what, seconds in (("forward", "forward passes", forward), ("data", "waiting for data", data)):
            slowest = max(range(len(seconds)), key=seconds.__getitem__)
            median = statistics.median(seconds)
            values |= {f"ranks/{name}_s": median, f"ranks/{name}_s_max": seconds[slowest]}
            values[f"ranks/{name}_slowest"] = f"rank {slowest} ({self.hosts[slowest]})"
            # Waits for data that are short against the forward passes are not reported, however uneven.
            if seconds[slowest] > SLOW * median and seconds[slowest] - median > (SLOW - 1) * statistics.median(forward):
                lines.append(
                    f"rank {slowest} on host {self.hosts[slowest]} is slow: {what} take {seconds[slowest]:.3g} s a "
                    f"step, {median:.3g} s in the median of {len(seconds)} ranks"
                )
        if on_gpu:
            values |= {"memory/allocated_gib": max(allocated), "memory/reserved_gib": max(reserved)}
        if lines:
            self.report(f"step {state.step}: {'; '.join(lines)}", values, state.step)
        else:
            self.record(values, state.step)


def _seconds_between(marks: list[Any]) -> float:
    """Seconds summed over pairs of marks. A forward pass that raised has no second mark and is not counted."""
    pairs = list(zip(marks[::2], marks[1::2], strict=False))
    if pairs and not isinstance(pairs[0][0], float):
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
    return sum(end - begin for begin, end in pairs)
