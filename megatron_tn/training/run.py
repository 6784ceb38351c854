"""A run's place on disk and in the world: its folder, its frozen config, its status, its checkpoints."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tn.checkpoint.background import CheckpointWriter, Save
from megatron_tn.checkpoint.load import load_checkpoint
from megatron_tn.checkpoint.manifest import step_of, whole_checkpoints
from megatron_tn.checkpoint.retention import Retention, set_aside
from megatron_tn.checkpoint.verify import glance, whole_from
from megatron_tn.config import ConfigError, TrainConfig, save, to_mapping
from megatron_tn.engine.base import Engine
from megatron_tn.engine.build import initialize_engine
from megatron_tn.parallel.world import join_world, leave_world
from megatron_tn.training.guard import Rewind
from megatron_tn.training.hooks import Hook, Sink
from megatron_tn.training.hooks.checkpoint import CheckpointEvery
from megatron_tn.training.hooks.console import ConsoleProgress
from megatron_tn.training.hooks.evaluate import EvaluateEvery, Interrupted
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.hooks.profile import Profile
from megatron_tn.training.hooks.ranks import RankReport
from megatron_tn.training.hooks.weights_and_biases import WeightsAndBiases
from megatron_tn.training.preflight import CHECKPOINTS, FROZEN, checkpoint_to_resume
from megatron_tn.training.state import TrainingState
from megatron_tn.training.throughput import Work
from megatron_tn.training.watchdog import Progress, Watchdog, living_run

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
        self.sinks: list[Sink] = []
        self.state = TrainingState()
        self.is_first = False
        self.progress = Progress()

    def __enter__(self) -> Run:
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            self.device = join_world(self.config.distributed_timeout_s)
        except RuntimeError as error:
            rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
            raise RuntimeError(
                f"rank {rank} of {size} could not join the others at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} within distributed_timeout_s={self.config.distributed_timeout_s}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        self.is_first = dist.get_rank() == 0
        torch.manual_seed(self.config.seed)
        self._refuse_a_second_run()
        if self.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            save(self.config, self.directory / FROZEN)
        self.watchdog = Watchdog(
            self.directory,
            self.progress,
            timeout_s=self.config.hang_timeout_s,
            long_s=self.config.distributed_timeout_s,
        )
        self.watchdog.__enter__()
        self.status("running")  # last: __exit__, which says how the run ended, is called from here on
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.progress.at("stop")
        why = f"{kind.__name__}: {error}" if kind else ""
        if kind is not None and (other := self.watchdog.explain(error)):
            log.error("rank %d stops: %s", dist.get_rank(), other)
            why = f"{other} (here: {why})"
        try:
            for hook in self.started:
                hook.on_stop(self.state)
        finally:
            if kind is not None:
                self.status("failed", error=why)
            elif self.state.step >= self.config.last_step:
                self.status("finished")
            else:
                self.status("preempted")
            leave_world()
            self.watchdog.__exit__(None, None, None)

    def _refuse_a_second_run(self) -> None:
        """Two runs in one folder would write over each other's checkpoints and log. Collective.

        Raises:
            ConfigError: on every rank.
        """
        found = [living_run(self.directory) if self.is_first else ""]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0)
        if found[0]:
            leave_world()
            raise ConfigError(f"run_dir={self.config.run_dir} is in use: {found[0]} trains in it")

    def restore(self, engine: Engine) -> TrainingState:
        """Load the checkpoint to resume from, or give the engine its initial values."""
        start = checkpoint_to_resume(self.config)
        self._load(engine, start)
        if start is not None and self.is_first:
            log.info("resumed from %s at step %d", start, self.state.step)
        self._set_later_aside()
        self.state.add_skip(self.config.data.skipped)
        return self.state

    def _set_later_aside(self) -> None:
        """A crash before the next save must not bring back what lies after the checkpoint resumed from: damaged ones,
        which stay as step_N.damaged-TIME for a person, or those that a person rewound from. Collective."""
        later = [path for path in whole_checkpoints(self.checkpoints) if step_of(path) > self.state.step]
        resume = self.config.checkpoint.resume
        damage = [line for path in later for line in glance(path)] if resume == "auto" else []
        dist.broadcast_object_list(found := [later, damage], src=0)  # before it renames
        later, damage = found
        if not later:
            return
        by, reason = ("damage", "; ".join(damage)) if damage else ("hand", f"checkpoint.resume={resume}")
        self._note_rewind(step_of(later[-1]), [], by, reason)
        for path in later if self.is_first else ():
            if damage:
                _keep_damaged(path, reason)
            else:
                set_aside(path)

    def rewind(self, engine: Engine, rewind: Rewind) -> None:
        """Go back to the newest whole checkpoint, or to the beginning, and skip the batches that went wrong. Damaged
        ones that are newer are left out as at a start. Collective.

        Raises:
            ConfigError: on every rank: there are checkpoints, and none is whole.
        """
        self.writer.join()
        found = [whole_from(self.checkpoints) if self.is_first else None]
        dist.broadcast_object_list(found, src=0)  # one rank's view of a shared file system, for all
        start, damage = found[0]
        if damage and start is None:
            raise ConfigError([*chain.from_iterable(damage.values()), f"no checkpoint in {self.checkpoints} is whole"])
        for path, problems in damage.items() if self.is_first else ():
            _keep_damaged(path, "; ".join(problems))
        before = self.state.step
        earlier, rewinds = self.state.skip, self.state.rewinds
        self._load(engine, start)
        self.state.add_skip([*earlier, *rewind.batches])
        self.state.rewinds = rewinds
        self._note_rewind(before, rewind.batches, "guard", rewind.reason)
        for hook in self.started:
            hook.on_rewind(self.state)
        line = f"rewound from step {before} to {self.state.step}; skipping batches {rewind.batches}"
        self.report(line, {"rewind/from": before, "rewind/skip": rewind.batches}, self.state.step)

    def _load(self, engine: Engine, start: Path | None) -> None:
        if start is None:
            torch.manual_seed(self.config.seed)
            initialize_engine(engine, self.config.seed)
            self.state.become(TrainingState())
        else:
            self.state.become(TrainingState.from_json(load_checkpoint(engine, start).training))

    def _note_rewind(self, step: int, batches: list[int], by: str, reason: str) -> None:
        note = {"from": step, "to": self.state.step, "skip": batches, "by": by, "reason": reason}
        self.state.rewinds = [*self.state.rewinds, note]

    def record(self, values: dict[str, Any], step: int) -> None:
        """Named values for log.jsonl and its copies; rank 0 writes."""
        for sink in self.sinks:
            sink.record(values, step)

    def report(self, line: str, values: dict[str, Any], step: int) -> None:
        """Say something out of the ordinary once, on rank 0, and record its values."""
        if self.is_first:
            log.error("%s", line)
        if values:
            self.record(values, step)

    def hooks(
        self,
        engine: Engine,
        *,
        stream_state: Callable[[int], dict[str, Any]],
        evaluate: Callable[..., dict[str, Any]] | None,
        interrupted: Callable[[], bool],
        flops_per_token: int,
    ) -> Sequence[Hook]:
        """The hooks that the config asks for, started. Sinks are on global rank 0 alone; saving is on all ranks.

        evaluate(progress=f): held-out figures; calls f, on all ranks, every few documents. interrupted: whether this
        rank was told to stop. flops_per_token: forward and backward, by the model's formula.
        """
        config, last, keep = self.config, self.config.last_step, self.config.checkpoint
        hooks: list[Hook] = []
        if self.is_first:
            log_file = self.directory / "log.jsonl"
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            work = Work(flops_per_token, engine.context.world_size, config.cluster.peak_tflops(gpu))
            self.sinks.append(Journal(log_file, config.logging.every, work))
            if config.logging.wandb.mode != "disabled":
                self.sinks.append(WeightsAndBiases(config.logging.wandb, self.directory, to_mapping(config), work))
            hooks += self.sinks
            if config.logging.progress:
                hooks.append(ConsoleProgress(last))
            if config.logging.profile:
                skip, steps = config.logging.profile_skip, config.logging.profile_steps
                hooks.append(Profile(self.directory / "profile", skip, steps))
        if evaluate is not None:

            def go_on(_documents: int) -> None:
                self.progress.at("evaluate")
                if anywhere(interrupted()):
                    self.report("the evaluation is left, to stop in time", {}, self.state.step)
                    raise Interrupted

            def evaluate_now() -> dict[str, Any]:
                with self.progress.during("evaluate"):
                    return evaluate(progress=go_on)

            hooks.append(EvaluateEvery(evaluate_now, self.record, config.evaluation.every, last))
        if config.logging.ranks_every:
            every = config.logging.ranks_every
            hooks.append(RankReport(engine, self.progress, self.report, self.record, every))
        self.writer = CheckpointWriter(
            self.checkpoints,
            Retention(newest=keep.keep, every=keep.keep_every, best=keep.keep_best),
            background=keep.async_save,
            timeout_s=config.distributed_timeout_s,
        )

        def save_now(state: TrainingState) -> Save | None:
            with self.progress.during("save"):
                state.stream = stream_state(state.samples)
                content = {"config": to_mapping(config), "training": state.to_json()}
                before = self.writer.save(engine, state.step, optimizer_step=state.optimizer_step, **content)
            self.status("running")
            return before

        abort, end = keep.on_failure == "abort", last if keep.at_end else 0
        tell = self.report, self.record
        hooks.append(CheckpointEvery(self.writer, save_now, *tell, every=keep.every, last=end, abort=abort))
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


def _keep_damaged(path: Path, reason: str) -> None:
    """Put a checkpoint that is not to be read where a person may look at it."""
    path = path.rename(path.with_suffix(f".damaged-{time.time():.0f}"))
    log.error("a damaged checkpoint was left out, and is kept as %s: %s", path, reason)


def anywhere(here: bool) -> bool:
    """Whether something holds on any rank. Collective, on the CPU: a GPU is not waited for."""
    flag = torch.tensor(int(here))
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
