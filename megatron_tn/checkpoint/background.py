"""Saving while training goes on: a step waits for the copy to the host alone, a thread does the rest.

The thread's collectives run on a gloo group of its own, so they cannot fall between those of training. At most one
save is under way; the next waits for it, and so does the end of the run. What is on the disk afterwards is the same,
byte for byte, as with a save that training waits for.
"""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tn.checkpoint.manifest import Trainable
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.checkpoint.save import HostMemory, take_snapshot, write_snapshot


@dataclass
class Save:
    """One save. pause_s: how long training stood still for it. write_s: from the snapshot to the rename. error: why it
    failed, on every rank; None when it did not."""

    step: int
    pause_s: float = 0.0
    write_s: float = 0.0
    path: Path | None = None
    error: Exception | None = None


class CheckpointWriter:
    """Saves one after the other. Making one is collective over all ranks, and so are `save` and `wait`.

    background: whether `save` returns once the snapshot is taken. timeout_s: how long a rank waits for the others.
    """

    def __init__(self, folder: Path, retention: Retention, *, background: bool, timeout_s: float):
        self.folder = folder
        self.retention = retention
        self.background = background
        self._group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._current: Save | None = None

    def save(self, engine: Trainable, step: int, **content) -> Save | None:
        """Save `step`; content as for `save_checkpoint`. Returns the save before it, if nobody has asked for it yet."""
        began = time.perf_counter()
        before = self.wait()
        snapshot = take_snapshot(engine, self.folder, step=step, memory=self._memory, **content)
        self._current = save = Save(step)

        def write() -> None:
            since = time.perf_counter()
            try:
                save.path = write_snapshot(snapshot, self.retention, self._group)
            except Exception as error:
                save.error = error
            save.write_s = time.perf_counter() - since

        # A daemon, so that a run that fails elsewhere is not kept alive by a disk that does not answer.
        self._thread = threading.Thread(target=write, name="checkpoint-writer", daemon=True)
        self._thread.start()
        if not self.background:
            self._thread.join()
        save.pause_s = time.perf_counter() - began
        return before

    def finished(self) -> Save | None:
        """The last save, once, when it is done. Not collective: ranks may learn of it at different steps."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def join(self) -> None:
        """Wait for the last save, and leave what became of it to whoever asks next."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> Save | None:
        """The last save, once, when it is done, however long that takes."""
        if self._thread is None:
            return None
        self.join()
        done, self._thread, self._current = self._current, None, None
        return done

    def close(self) -> Save | None:
        """Wait for the last save and give the host memory back."""
        done = self.wait()
        self._memory.release()
        return done
