"""Copies the journal to Weights & Biases. Training neither waits nor fails when wandb is slow, offline or down."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import uuid
from collections.abc import Iterator
from typing import Any

from megatron_tn.config import WandbConfig, replacing, storable
from megatron_tn.training.hooks import NullHook
from megatron_tn.training.hooks.wandb_file import last_step_in
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class WeightsAndBiases(NullHook):
    """All starts of a run use one wandb run id, kept in run_dir/wandb_id.

    wandb cannot delete logged steps. So after a rewind, steps go to a new wandb run, ID-r1, ID-r2, ..., which begins
    with the journal's records up to the rewind; these wandb runs share a group.

    Every start sends the journal's records that wandb lacks: all of them to a new wandb run, and after a kill those
    that were only in wandb's memory.
    """

    def __init__(self, config: WandbConfig, folder: RunFolder, run_config: dict[str, Any], work: Work):
        self.config = config
        self.folder = folder
        self.run_config = run_config
        self.work = work
        self._run = None
        self._told = 0  # last step in wandb's files when this process began

    def on_start(self, state: TrainingState) -> None:
        self._tick = self.work.clock.now()
        try:
            self._begin(state)
        except Exception as error:
            self._give_up(error)

    def on_rewind(self, state: TrainingState) -> None:
        self.on_stop(state)
        self.on_start(state)

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if report.skipped:
            return
        now = self.work.clock.now()
        values = {
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens": state.tokens,
            **self.work.rates(report.tokens / (now - self._tick)),
        }
        self._tick = now
        self.record(values, state.step)

    def record(self, values: dict[str, Any], step: int) -> None:
        if self._run is None or step <= self._told:
            return
        try:
            self._run.log(values, step=step)
        except Exception as error:
            self._give_up(error)

    def on_stop(self, state: TrainingState) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _begin(self, state: TrainingState) -> None:
        import wandb

        mode = self.config.mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            log.warning("wandb: nobody is logged in here, so it logs offline; `wandb sync` uploads it later")
            mode = "offline"
        part = f"-r{len(state.rewinds)}" if state.rewinds else ""
        first = self._id()
        self._told = last_step_in(self.folder.wandb, first + part) if mode == "offline" else 0
        with _command_line_without_credentials():
            self._run = self._init(wandb, mode, first, part)
        if mode == "online":
            self._told = max(self._run.starting_step - 1, 0)
        for values in self.folder.records():
            step = values.pop("step")
            if isinstance(step, int) and self._told < step <= state.step:
                self.record({name: v for name, v in values.items() if isinstance(v, int | float)}, step)

    def _init(self, wandb: Any, mode: str, first: str, part: str) -> Any:
        return wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            mode=mode,
            id=first + part,
            name=self.folder.path.name + part,
            group=first,
            dir=self.folder.path,
            resume="allow",
            config=self.run_config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _id(self) -> str:
        """The content of run_dir/wandb_id, made anew where that is absent or, as after a full disk, empty."""
        file = self.folder.wandb_id
        if not file.is_file() or not RUN_ID.fullmatch(file.read_text(errors="replace").strip()):
            with replacing(file) as new:
                new.write(uuid.uuid4().hex[:8])
        return file.read_text().strip()

    def _give_up(self, error: Exception) -> None:
        log.warning("wandb: %s: %s; going on without it (log.jsonl has everything)", type(error).__name__, error)
        self._run = None


@contextlib.contextmanager
def _command_line_without_credentials() -> Iterator[None]:
    """wandb stores the arguments of the process."""
    before = sys.argv
    sys.argv = storable(before)
    try:
        yield
    finally:
        sys.argv = before
