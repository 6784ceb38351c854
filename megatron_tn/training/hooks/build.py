"""Create and start the hooks of a config."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_tn.checkpoint.background import CheckpointWriter, Save
from megatron_tn.checkpoint.retention import Retention
from megatron_tn.config import to_stored
from megatron_tn.engine.base import Engine
from megatron_tn.parallel.world import anywhere
from megatron_tn.training.goodput import process_began
from megatron_tn.training.hooks import Hook
from megatron_tn.training.hooks.checkpoint import CheckpointEvery
from megatron_tn.training.hooks.console import ConsoleProgress
from megatron_tn.training.hooks.evaluate import EvaluateEvery, Interrupted
from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.hooks.profile import Profile
from megatron_tn.training.hooks.ranks import RankReport
from megatron_tn.training.hooks.tensorboard import TensorBoard
from megatron_tn.training.hooks.weights_and_biases import WeightsAndBiases
from megatron_tn.training.run import Run
from megatron_tn.training.state import TrainingState
from megatron_tn.training.throughput import Work


def start_hooks(
    run: Run,
    engine: Engine,
    *,
    stream_state: Callable[[int], dict[str, Any]],
    evaluate: Callable[..., dict[str, Any]] | None,
    interrupted: Callable[[], bool],
    flops_per_token: int,
) -> Sequence[Hook]:
    """Collective. Sinks, the profile and the console are on global rank 0 alone; the others are on all ranks.

    stream_state(sample): the token stream's state at index `sample`. evaluate(progress=f): held-out figures; calls f on
    all ranks every few documents. interrupted: whether this rank received a stop signal. flops_per_token: FLOPs of
    forward and backward pass by the model's formula.
    """
    config = run.config
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    work = Work(flops_per_token, engine.context.world_size, config.cluster.peak_tflops(gpu), run.sampled_tflops)
    hooks = _of_rank_0(run, work)
    if evaluate is not None:
        hooks.append(_evaluation(run, work, evaluate, interrupted))
    if run.is_first and config.logging.progress:  # after the evaluation, whose loss it shows
        hooks.append(ConsoleProgress(config.last_step, work))
    if config.logging.ranks_every:
        hooks.append(RankReport(engine, run.progress, run.report, run.record, config.logging.ranks_every))
    hooks.append(_checkpoints(run, work, engine, stream_state))
    for hook in hooks:
        run.started.append(hook)
        with work.clock.pause():  # a dashboard that is slow to answer is none of the first step's time
            hook.on_start(run.state)
    return hooks


def _of_rank_0(run: Run, work: Work) -> list[Hook]:
    if not run.is_first:
        return []
    config, logging = run.config, run.config.logging
    settings = to_stored(config)
    evaluated = config.evaluation.every if config.evaluation.is_on else 0

    def figures() -> StepFigures:
        """Held-out losses have their place, by tokens and seconds, from the record of their step."""
        return StepFigures(
            work,
            logging.every,
            waited_s=functools.partial(run.progress.seconds.__getitem__, "data"),
            also=lambda step: step == config.last_step or bool(evaluated and step % evaluated == 0),
        )

    run.sinks.append(Journal(run.folder.journal, figures(), began=max(process_began(), run.ended)))
    if logging.wandb.mode != "disabled":
        run.sinks.append(WeightsAndBiases(logging.wandb, run.folder, settings, figures()))
    if logging.tensorboard:
        run.sinks.append(TensorBoard(run.folder, settings, figures()))
    hooks: list[Hook] = [*run.sinks]
    if logging.profile:
        hooks.append(Profile(run.folder.profile, logging.profile_skip, logging.profile_steps))
    return hooks


def _evaluation(
    run: Run, work: Work, evaluate: Callable[..., dict[str, Any]], interrupted: Callable[[], bool]
) -> EvaluateEvery:
    def go_on(_documents: int, _tokens: int) -> None:
        run.progress.at("evaluate")
        if anywhere(interrupted()):
            run.report("evaluation interrupted by the stop signal", {}, run.state.step)
            raise Interrupted

    def evaluate_now() -> dict[str, Any]:
        with run.progress.during("evaluate"), work.clock.pause():
            return evaluate(progress=go_on)

    return EvaluateEvery(evaluate_now, run.record, run.config.evaluation.every, run.config.last_step)


def _checkpoints(
    run: Run, work: Work, engine: Engine, stream_state: Callable[[int], dict[str, Any]]
) -> CheckpointEvery:
    config, keep = run.config, run.config.checkpoint
    run.writer = writer = CheckpointWriter(
        run.folder.checkpoints,
        Retention(newest=keep.keep, every=keep.keep_every, best=keep.keep_best),
        background=keep.async_save,
        timeout_s=config.distributed_timeout_s,
        memory=run.memory,
    )

    def save(state: TrainingState) -> Save | None:
        with run.progress.during("save"), work.clock.pause():
            state.stream = stream_state(state.samples)
            content = {"config": to_stored(config), "training": state.to_json()}
            before = writer.save(engine, state.step, optimizer_step=state.optimizer_step, **content)
        run.status("running")
        return before

    return CheckpointEvery(
        writer,
        functools.partial(writer.prepare, engine),
        save,
        run.report,
        run.record,
        every=keep.every,
        last=config.last_step,
        at_end=keep.at_end,
        abort=keep.on_failure == "abort",
    )
