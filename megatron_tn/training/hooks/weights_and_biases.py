"""Weights & Biases as a copy of the journal. It may be slow, offline or down: training never waits for it or fails."""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_tn.config import WandbConfig
from megatron_tn.training.hooks import NullHook
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport

log = logging.getLogger(__name__)


class WeightsAndBiases(NullHook):
    """One run id for all processes of a run: it is kept in run_dir/wandb_id."""

    def __init__(self, config: WandbConfig, run_dir: Path, run_config: dict[str, Any]):
        self.config = config
        self.run_dir = run_dir
        self.run_config = run_config
        self._run = None

    def on_start(self, state: TrainingState) -> None:
        self._tick = time.perf_counter()
        id_file = self.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            import wandb

            self._run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                mode=self.config.mode,
                id=id_file.read_text().strip(),
                name=self.run_dir.name,
                dir=self.run_dir,
                resume="allow",
                config=self.run_config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            self._give_up(error)

    def on_step(self, state: TrainingState, report: StepReport) -> None:
        now = time.perf_counter()
        values = {
            "loss": report.loss,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": report.tokens / (now - self._tick),
        }
        self._tick = now
        self.log(values, state.step)

    def log(self, values: dict[str, Any], step: int) -> None:
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
