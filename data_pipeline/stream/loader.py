"""Prefetches a rank's share of each step's global batch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import InputError
from data_pipeline.stream.ahead import read_ahead
from data_pipeline.stream.device import receive, send
from data_pipeline.stream.sample import Batch
from data_pipeline.stream.token_stream import TokenStream

TRAINER_S = 1.0  # seconds between a reader's looks at whether its trainer lives

Plan = Callable[[int], tuple[int, int] | None]


class BatchLoader:
    """Iterates over steps, each a list of microbatches: the contiguous share of data-parallel rank `rank` of `size`.

    `plan(step)`: the step's global batch as (first sample, number of samples), or None after the last step. The share
    of rank r is samples [first + r * share, first + (r + 1) * share), in microbatches of `micro_batch` samples.
    `workers`: 0 reads in a thread, n > 0 in n processes; `prefetch`: steps that the thread, and each process, reads
    ahead. `device`: the thread copies batches there; `target_tokens` stays on the host. Iteration starts at attribute
    `step`, which may be set before and is always the next step. Raises InputError when a global batch is not divisible.
    Does not use torch's global random state. `close`, or a with statement, stops the threads and processes.
    """

    def __init__(
        self,
        stream: TokenStream,
        plan: Plan,
        *,
        micro_batch: int,
        rank: int = 0,
        size: int = 1,
        workers: int = 0,
        step: int = 0,
        prefetch: int = 2,
        device: torch.device | None = None,
    ):
        for name, value, least in (("micro_batch", micro_batch, 1), ("workers", workers, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        if not 0 <= rank < size:
            raise InputError(f"rank={rank} must be in [0, size={size})")
        self.stream = stream
        self.plan = plan
        self.micro_batch = micro_batch
        self.rank = rank
        self.size = size
        self.workers = workers
        self.step = step
        self.prefetch = prefetch
        self.device = device
        self._running: Iterator[list[Batch]] | None = None
        self._share(step)  # raises for an indivisible batch before anything is started

    def __iter__(self) -> Iterator[list[Batch]]:
        self.close()
        # No local variable for the steps: the suspended frame would keep the reader processes alive after `close`.
        running = read_ahead(send(self._in_processes() if self.workers else self._here(), self.device), self.prefetch)
        self._running = running
        try:
            for microbatches in map(receive, running):
                self.step += 1
                for batch in microbatches:
                    self.stream.record(batch)
                yield microbatches
        finally:
            running.close()

    def close(self) -> None:
        """Stops prefetching and waits for its end."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _share(self, step: int) -> range | None:
        planned = self.plan(step)
        if planned is None:
            return None
        first, samples = planned
        if samples < 1 or samples % (self.size * self.micro_batch):
            raise InputError(
                f"global batch of step {step}: {samples} samples are not divisible by size={self.size} data-parallel "
                f"ranks x micro_batch={self.micro_batch}"
            )
        share = samples // self.size
        return range(first + self.rank * share, first + (self.rank + 1) * share)

    def _shares(self) -> Iterator[range]:
        step = self.step
        while (share := self._share(step)) is not None:
            yield share
            step += 1

    def _here(self) -> Generator[list[Batch]]:
        reader = _Shares(self.stream, self.micro_batch)
        for share in self._shares():
            yield reader[share]

    def _in_processes(self) -> Generator[list[Batch]]:
        loader = DataLoader(
            _Shares(self.stream, self.micro_batch),
            sampler=self._shares(),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch,
            collate_fn=_as_it_is,
            worker_init_fn=_end_by_parent_alone,
            # DataLoader draws a seed for its workers; from the global generator, training would depend on `workers`.
            generator=torch.Generator(),
        )
        # Started here, in the main thread, where PyTorch detects a dead worker at once. The iterator's finaliser ends
        # the processes, so only the generator may reference the iterator. A forked reader inherits the signal mask: a
        # SIGTERM that reaches it before `_end_by_parent_alone` runs waits, too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            steps = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return (step for step in steps)


class _Shares(Dataset):
    def __init__(self, stream: TokenStream, micro_batch: int):
        self.stream = stream
        self.micro_batch = micro_batch

    def __getitem__(self, share: range) -> list[Batch]:
        try:
            return [
                self.stream.read(share[start : start + self.micro_batch])
                for start in range(0, len(share), self.micro_batch)
            ]
        except StopIteration as error:  # raised by a document stage; must not look like the end of the data
            raise RuntimeError("a document stage or filter raised StopIteration") from error


def _as_it_is(item):
    return item


def _end_by_parent_alone(_worker: int) -> None:
    """In a reader process: only a SIGTERM from the trainer ends it, and the trainer's end.

    SLURM and container runtimes send a job's stop signal to all its processes. The trainer then finishes its step and
    saves; a reader that died before would make it fail. A killed trainer sends nothing. Then DataLoader's own watch,
    which looks at the parent process, sees nothing either where a fork server is the parent: Python's default start
    method from 3.14 on.
    """
    trainer = multiprocessing.parent_process()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        while trainer.is_alive():
            told = signal.sigtimedwait({signal.SIGTERM}, TRAINER_S)
            if told is not None and told.si_pid == trainer.pid:
                break
        os._exit(0)

    threading.Thread(target=wait_for_parent, name="signals", daemon=True).start()
