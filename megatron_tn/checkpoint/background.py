"""Asynchronous saving: a training step waits only for the copy to host memory; a thread writes the files.

The thread has its own gloo group, so its collectives never interleave with training's. At most one save is in
progress; the next save waits for it, and so does the end of the run. Asynchronous and synchronous saves write the same
bytes.
"""

import datetime
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tn.checkpoint.manifest import Trainable
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.checkpoint.save import prepare_host_memory, take_snapshot, write_snapshot
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.device.threads import start_thread


@dataclass
class Save:
    """One save. pause_s: seconds that `CheckpointWriter.save` took, of which wait_s for the previous save's write.
    write_s: seconds from the snapshot to the rename. error: set on every rank when the save failed."""

    step: int
    pause_s: float = 0.0
    wait_s: float = 0.0
    write_s: float = 0.0
    path: Path | None = None
    error: Exception | None = None


class CheckpointWriter:
    """Writes one checkpoint at a time. The constructor, `save` and `wait` are collective over all ranks.

    background: whether `save` returns once the snapshot is taken; else once the files are written, from the engine's
    tensors without a copy. timeout_s: how long a rank waits for the others.
    memory: of the snapshots, where something else has used it before.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        *,
        background: bool,
        timeout_s: float,
        memory: HostMemory | None = None,
    ):
        self.folder = folder
        self.retention = retention
        self.background = background
        self._group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
        self._memory = (memory or HostMemory()) if background else None
        self._thread: threading.Thread | None = None
        self.current: Save | None = None  # the last save, until `wait` or `finished` has returned it

    def prepare(self, engine: Trainable) -> None:
        """Begin to make the host memory of the saves, in a thread: else the first save waits for it. Not collective."""
        if self._memory is not None:
            prepare_host_memory(engine, self._memory)

    def save(self, engine: Trainable, step: int, **content) -> Save | None:
        """Save `step`; content: of `take_snapshot`. Returns the previous `Save`, as `wait` does."""
        began = time.perf_counter()
        before = self.wait()
        waited = time.perf_counter() - began
        snapshot = take_snapshot(engine, self.folder, step=step, memory=self._memory, **content)
        self.current = save = Save(step, wait_s=waited)

        def write() -> None:
            since = time.perf_counter()
            try:
                save.path = write_snapshot(snapshot, self.retention, self._group)
            except Exception as error:
                save.error = error
            save.write_s = time.perf_counter() - since

        self._thread = start_thread(write, "checkpoint-writer")
        if not self.background:
            self._thread.join()
        save.pause_s = time.perf_counter() - began
        return before

    def finished(self) -> Save | None:
        """The last save if its thread has ended, else None; returned once. Not collective: ranks may see it at
        different steps."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def join(self) -> None:
        """Wait for `prepare` and the last save; a later `finished` or `wait` still returns the save."""
        if self._memory is not None:
            self._memory.join()
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> Save | None:
        """Wait for the last save and return it, once; None where there is none or it was returned before."""
        if self._thread is None:
            return None
        self.join()
        done, self._thread, self.current = self.current, None, None
        return done

    def close(self) -> Save | None:
        """Wait for the last save and free the host memory."""
        done = self.wait()
        if self._memory is not None:
            self._memory.release()
        return done
