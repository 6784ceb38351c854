"""A run's place on disk and in the world: its folder, its frozen config, its status, its checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.save import save_checkpoint
from megatron_tn.config import TrainConfig, save, to_mapping
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import initialize_engine
from megatron_tn.parallel.world import join_world, leave_world
from megatron_tn.training.hooks import Hook
from megatron_tn.training.hooks.checkpoint import CheckpointEvery
from megatron_tn.training.hooks.console import ConsoleProgress
from megatron_tn.training.hooks.evaluate import EvaluateEvery
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.hooks.weights_and_biases import WeightsAndBiases
from megatron_tn.training.preflight import CHECKPOINTS, FROZEN, checkpoint_to_resume
from megatron_tn.training.state import TrainingState

log = logging.getLogger(__name__)


class Run:
    """Use as a context manager: joins the world, and leaves it with run_dir/status.json saying how it ended.

    status.json: {"state": "running" | "finished" | "preempted" | "failed", "step": steps done, "time": seconds}.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.directory = Path(config.run_dir)
        self.checkpoints = self.directory / CHECKPOINTS
        self.started: list[Hook] = []
        self.state = TrainingState()
        self.is_first = False

    def __enter__(self) -> Run:
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.device = join_world(self.config.distributed_timeout_s)
        self.is_first = torch.distributed.get_rank() == 0
        torch.manual_seed(self.config.seed)
        if self.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            save(self.config, self.directory / FROZEN)
        self.status("running")
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            for hook in self.started:
                hook.on_stop(self.state)
        finally:
            if kind is not None:
                self.status("failed", error=f"{kind.__name__}: {error}")
            elif self.state.step >= self.config.last_step:
                self.status("finished")
            else:
                self.status("preempted")
            leave_world()

    def restore(self, engine: Engine) -> TrainingState:
        """Load the checkpoint to resume from, or give the engine its initial values."""
        start = checkpoint_to_resume(self.config)
        if start is None:
            initialize_engine(engine, self.config.seed)
        else:
            manifest = load_checkpoint(engine, start)
            self.state = TrainingState(**manifest.training)
            if self.is_first:
                log.info("resumed from %s at step %d", start, self.state.step)
        return self.state

    def hooks(
        self,
        engine: Engine,
        *,
        stream_state: Callable[[int], dict[str, Any]],
        evaluate: Callable[[], dict[str, Any]] | None,
    ) -> Sequence[Hook]:
        """The hooks that the config asks for, started. Sinks are on global rank 0 alone; saving is on all ranks."""
        config, last = self.config, self.config.last_step
        hooks: list[Hook] = []
        record: Callable[[dict[str, Any], int], None] = lambda values, step: None  # noqa: E731
        if self.is_first:
            journal = Journal(self.directory / "log.jsonl", config.logging.every, engine.context.world_size)
            hooks.append(journal)
            board = None
            if config.logging.wandb.mode != "disabled":
                board = WeightsAndBiases(config.logging.wandb, self.directory, to_mapping(config))
                hooks.append(board)
            if config.logging.progress:
                hooks.append(ConsoleProgress(last))

            def record(values: dict[str, Any], step: int) -> None:
                journal.write({"step": step, **values})
                if board is not None:
                    board.log(values, step)

        if evaluate is not None:
            hooks.append(EvaluateEvery(evaluate, record, config.evaluation.every, last))

        def save_now(state: TrainingState) -> None:
            state.stream = stream_state(state.samples)
            save_checkpoint(
                engine,
                self.checkpoints,
                step=state.step,
                optimizer_step=state.optimizer_step,
                config=to_mapping(config),
                training=state.to_json(),
                keep=config.checkpoint.keep,
            )
            self.status("running")

        hooks.append(CheckpointEvery(save_now, config.checkpoint.every, last if config.checkpoint.at_end else 0))
        for hook in hooks:
            self.started.append(hook)
            hook.on_start(self.state)
        return hooks

    def keep_tokenizer(self, tokenizer: Path) -> None:
        """Copy tokenizer.json into the run, so that its checkpoints can be read as text wherever they go."""
        if self.is_first and tokenizer.is_file():
            shutil.copyfile(tokenizer, self.directory / "tokenizer.json")

    def status(self, state: str, **more: Any) -> None:
        """Replace status.json; rank 0 writes."""
        if not self.is_first:
            return
        values = {"state": state, "step": self.state.step, "time": time.time(), "config": FROZEN} | more
        partial = self.directory / "status.tmp"
        partial.write_text(json.dumps(values) + "\n")
        partial.replace(self.directory / "status.json")
