"""Start and end of a run: process groups, lock on the run folder, status.json."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megatron_tn.checkpoint.ahead import ReadAhead
from megatron_tn.checkpoint.background import CheckpointWriter
from megatron_tn.checkpoint.load import Weights
from megatron_tn.checkpoint.save import CheckpointError
from megatron_tn.config import ConfigError, TrainConfig, redacted
from megatron_tn.device.allocator import return_cached_segments
from megatron_tn.device.host_memory import HostMemory
from megatron_tn.device.matrix_rate import matmul_tflops
from megatron_tn.parallel.world import first_for_all, join_world, leave_world
from megatron_tn.training.curve import draw
from megatron_tn.training.freeze import goes_on, slurm_job
from megatron_tn.training.goodput import goodput_of
from megatron_tn.training.hooks import Hook, Sink
from megatron_tn.training.resume import Start, agree_on, agree_on_settings, choose_start
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.summary import show_end
from megatron_tn.training.watchdog import Progress, Watchdog, living_run

log = logging.getLogger(__name__)


class Run:
    """A context manager: initialises process groups, locks the folder, and on exit writes to status.json how the run
    ended. Entry and exit are collective.

    start: rank 0's choice of checkpoint; None on other ranks, which receive it from rank 0. open_weights: of
    `start.weights`. given: the settings of this rank's command line, which must be those of rank 0; None: `config`.

    Raises, on entry and on every rank:
        ConfigError: another run has the folder, ranks' settings differ, or some rank does not see the checkpoint. The
            folder is as it was.
        RuntimeError: not all ranks joined within distributed_timeout_s.
    """

    writer: CheckpointWriter  # set by hooks.build.start_hooks
    ended: ClassVar[float] = 0.0  # Unix time at which the run before in this process ended: a sweep's job before

    def __init__(
        self,
        config: TrainConfig,
        start: Start | None,
        open_weights: Callable[[Path], AbstractContextManager[Weights]],
        given: TrainConfig | None = None,
    ):
        self.config = config
        self.given = given or config
        self.open_weights = open_weights
        self.start = start
        self.folder = RunFolder(config.run_dir)
        self.started: list[Hook] = []
        self.sinks: list[Sink] = []
        self.state = TrainingState()
        self.is_first = False
        self.has_begun = False  # set by rewind.restore: a ConfigError before is a start that is refused
        self.progress = Progress()
        self._status_is_written = True

    def __enter__(self) -> Run:
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(self.config.deterministic)  # the job before, of a sweep, may differ
        self.device = join_world(self.config.distributed_timeout_s)
        try:
            self.is_first = dist.get_rank() == 0
            torch.manual_seed(self.config.seed)
            agree_on_settings(self.given)
            self.start = agree_on(lambda: self.start)
            first_for_all(self._take_folder)
            self._read_ahead()
            self.sampled_tflops = self._sample_matrix_rate()
            limits = {"timeout_s": self.config.hang_timeout_s, "long_s": self.config.distributed_timeout_s}
            self.watchdog = Watchdog(self.folder, self.progress, **limits)
        except BaseException as error:
            leave_world()
            self._release(error)
            raise
        self.watchdog.__enter__()
        self.status("running")  # last: after this, __exit__ is called and replaces the status
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.progress.at("stop")
        why = f"{kind.__name__}: {error}" if kind else ""
        if kind is not None:
            other = self.watchdog.explain(error)
            if not issubclass(kind, ConfigError | KeyboardInterrupt | SystemExit):
                self._say_why_it_failed(error, other)
            why = f"{other} (here: {why})" if other else why
        state = "failed" if kind else "finished" if self.state.step >= self.config.last_step else "preempted"
        self._record_stop(state, {"stop/error": redacted(why)} if why else {})
        try:
            for hook in self.started:
                hook.on_stop(self.state)
        finally:
            if state == "failed":
                self.status(state, error=why)
            else:
                self.status(state)
                self._sum_up("finished" if state == "finished" else "stopped")
            if state == "preempted":
                self._say_how_to_go_on()
            leave_world()
            self.watchdog.__exit__(None, None, None)
            self._release(error)
            Run.ended = time.time()

    def _release(self, error: BaseException | None) -> None:
        """Unlock the folder, as it was where this start is refused: by a ConfigError before training could begin, such
        as a checkpoint whose bytes are not those that were saved."""
        if self.is_first and not self.has_begun and isinstance(error, ConfigError):
            self.folder.put_back()
        self.folder.release()

    def _read_ahead(self) -> None:
        """Begin to read the checkpoint, while the model is built."""
        self.memory = HostMemory() if self.config.checkpoint.async_save else None
        self.ahead = ReadAhead(
            dist.get_rank(),
            dist.get_world_size(),
            self.memory,
            verify=self.config.checkpoint.verify,
            pinned=self.device.type == "cuda",
        )
        if self.start.checkpoint is not None:
            self.ahead.begin(self.start.checkpoint)
            self.state.step = self.start.manifest.step  # for status.json until the checkpoint is loaded

    def _sample_matrix_rate(self) -> float | None:
        """TFLOP/s of rank 0's GPU, before the model takes memory; None on other ranks and without a GPU."""
        if not self.is_first or self.device.type != "cuda":
            return None
        rate = matmul_tflops(self.device)
        return_cached_segments(self.device)
        return rate

    def _record_stop(self, state: str, why: dict[str, str]) -> None:
        """Record how this start ended, and the goodput of all starts so far."""
        if not self.sinks:
            return
        self.record({"stop/state": state} | why, self.state.step)
        try:
            goodput = goodput_of(self.folder)
        except Exception as error:  # the run is saved, whatever is wrong with its journal
            log.warning("goodput cannot be computed: %s: %s", type(error).__name__, error)
            return
        if goodput is not None:
            self.record(goodput.values(), self.state.step)

    def _say_why_it_failed(self, error: BaseException, other: str) -> None:
        """Tell, in one line of the first rank that fails, why, and which file has its traceback. Where no file can be
        written, Hydra prints the traceback, unless the disk is the failure. other: which rank's end made this one fail,
        where that is known."""
        rank, host = dist.get_rank(), socket.gethostname()
        path = self.folder.write_traceback(rank, error)
        error.is_told = path is not None or isinstance(error, OSError | CheckpointError)
        if not self.watchdog.is_first_to_fail():
            return
        why = other or f"{type(error).__name__}: {' '.join(str(error).split())} (host {host})"
        log.error("rank %d stops: %s%s", rank, why, f"; traceback: {path}" if path else "")

    def _take_folder(self) -> None:
        """Lock the folder: two runs in it would overwrite each other's checkpoints and journal. Called on rank 0.

        Raises:
            ConfigError: another run has the lock, or has just saved into the folder; or it cannot be written.
        """
        run_dir = f"run_dir={self.config.run_dir}"
        try:
            if holder := self.folder.claim() or living_run(self.folder):
                raise ConfigError(f"{run_dir} is in use: {holder} trains in it")
            # The checkpoint was chosen before the lock was taken; another run may have saved and ended in between.
            if choose_start(self.config, self.folder, requeued=goes_on(self.folder)) != self.start:
                raise ConfigError(f"{run_dir}: another run saved into it while this one started: start it again")
            self.folder.freeze(self.config, slurm_job())
        except OSError as error:
            raise ConfigError(f"{run_dir} cannot be written: {error.strerror}") from None

    def _sum_up(self, state: str) -> None:
        """Picture and table. The run is saved: whatever is wrong with its journal or the disk is a warning."""
        logging = self.config.logging
        if not self.is_first or not logging.summary:
            return
        parts = {"loss.png": partial(draw, {self.folder.path.name: self.folder}, self.folder.path / "loss.png")}
        if logging.progress:
            parts["the table"] = partial(show_end, self.config, self.folder, state)
        for name, make in parts.items():
            try:
                make()
            except Exception as error:
                log.warning("%s cannot be made: %s: %s", name, type(error).__name__, error)

    def _say_how_to_go_on(self) -> None:
        if self.is_first:
            command = "the same command"
            if self.config.checkpoint.resume != "auto":
                command += f" without checkpoint.resume={self.config.checkpoint.resume}"
            log.info("saved step %d; %s continues the run", self.state.step, command)

    def record(self, values: dict[str, Any], step: int) -> None:
        """Write named values to the journal and its copies, on rank 0."""
        for sink in self.sinks:
            sink.record(values, step)

    def report(self, line: str, values: dict[str, Any], step: int) -> None:
        """Print a line about an unusual event and record its values, on rank 0."""
        if self.is_first:
            log.error("%s", line)
        if values:
            self.record(values, step)

    def status(self, state: str, **more: Any) -> None:
        """Replace status.json, on rank 0. A failed write is reported once and does not end the run."""
        if not self.is_first:
            return
        try:
            self.folder.write_status(state, self.state.step, **more)
            self._status_is_written = True
        except OSError as error:
            if self._status_is_written:
                log.error("%s cannot be written: %s; training goes on", self.folder.status_file, error.strerror)
            self._status_is_written = False
