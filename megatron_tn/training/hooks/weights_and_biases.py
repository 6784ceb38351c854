"""Weights & Biases as a copy of the journal. It may be slow, offline or down: training never waits for it or fails."""

from __future__ import annotations

import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_tn.config import WandbConfig
from megatron_tn.training.hooks import NullHook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.throughput import Work

log = logging.getLogger(__name__)


class WeightsAndBiases(NullHook):
    """One run id for all processes of a run: it is kept in run_dir/wandb_id.

    wandb cannot take back what it was told. So the part of a run that follows a rewind has an id of its own, ID-r1,
    ID-r2, ..., begins with the journal's records up to there, and shows one clean curve; the parts share a group.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, run_config: dict[str, Any], work: Work):
        self.config = config
        self.run_dir = run_dir
        self.run_config = run_config
        self.work = work
        self._run = None

    def on_start(self, state: TrainingState) -> None:
        self._tick = time.perf_counter()
        id_file = self.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            import wandb

            first = id_file.read_text().strip()
            part = f"-r{len(state.rewinds)}" if state.rewinds else ""
            self._run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                mode=self.config.mode,
                id=first + part,
                name=self.run_dir.name + part,
                group=first,
                dir=self.run_dir,
                resume="allow",
                config=self.run_config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            self._give_up(error)
        told = self.run_dir / f"wandb_id{part}.told"
        if part and not told.exists():
            self._retell(state.step)
            told.touch()

    def on_rewind(self, state: TrainingState) -> None:
        self.on_stop(state)
        self.on_start(state)

    def _retell(self, last: int) -> None:
        """The journal up to step `last`, told again to a new part."""
        journal = self.run_dir / "log.jsonl"
        for line in journal.read_text().splitlines() if journal.is_file() else []:
            values = json.loads(line)
            if (step := values.pop("step")) <= last:
                self.record({name: v for name, v in values.items() if isinstance(v, int | float)}, step)

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        if report.skipped:
            return
        now = time.perf_counter()
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
        if self._run is not None:
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

    def _give_up(self, error: Exception) -> None:
        log.warning("wandb: %s: %s; going on without it (log.jsonl has everything)", type(error).__name__, error)
        self._run = None
