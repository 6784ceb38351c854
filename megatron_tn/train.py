"""Train a TransNormerLLM: the command line and the whole loop.

python -m megatron_tn.train model=385m data.manifest=... run_dir=runs/mine                                one process
torchrun --nproc-per-node 8 -m megatron_tn.train model=7b parallel.tp=8 data.manifest=... run_dir=...     a node
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from webdataset import DataPipeline

from data_pipeline.stream import (
    Batch,
    InputError,
    StreamState,
    TokenStream,
    batches,
)
from kernels.dispatch import in_words
from megatron_tn.cli import command, is_first_process, run_program
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.data import open_stream, with_token_ids
from megatron_tn.engine.build import DTYPES, build_engine
from megatron_tn.evaluate import evaluate_in_training, problems_in_training
from megatron_tn.loading import open_weights, resolve_checkpoint
from megatron_tn.model.registry import check_kernels, parameter_count, training_flops_per_token
from megatron_tn.optim.schedule import batch_of_step, learning_rate
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import processes_here, world_size
from megatron_tn.planning.concerns import other_world
from megatron_tn.planning.host import cpu_cost
from megatron_tn.plot import compare
from megatron_tn.training.diagnose import find_nonfinite
from megatron_tn.training.freeze import goes_on, settings_of_this_start
from megatron_tn.training.guard import Guard
from megatron_tn.training.hooks.build import start_hooks
from megatron_tn.training.preemption import Preemption
from megatron_tn.training.preflight import checkpoint_problems, model_differences, problems_before_start
from megatron_tn.training.resume import Start, choose_start
from megatron_tn.training.rewind import restore, rewind
from megatron_tn.training.run import Run
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import skipped_step, train_step
from megatron_tn.training.summary import show_start
from megatron_tn.training.watchdog import Progress

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> int | None:
    """Returns the exit code of a run that was told to stop before its end, and None for one that reached it."""
    config, stream, start = preflight(config)
    with Preemption(joined=False) as preemption, Run(config, start, open_weights) as run:
        preemption.joined = True
        go_to(stream, run.start)
        context = ParallelContext.create(
            config.parallel.tp, config.parallel.cp, sequence_parallel=config.parallel.sequence_parallel
        )
        engine = build_engine(config, context, run.device)
        check_kernels(engine.model, run.device, DTYPES[config.engine.precision])
        state = restore(run, engine)
        if run.is_first:
            run.folder.keep_tokenizer(stream.manifest.directory / stream.manifest.tokenizer.file)
            if config.logging.progress and state.step < config.last_step:
                show_start(
                    config,
                    context,
                    run.device,
                    parameters=parameter_count(config.model),
                    kernels=in_words(run.device.type),
                    step=state.step,
                    epoch_samples=stream.samples_per_epoch,
                )
        hooks = start_hooks(
            run,
            engine,
            stream_state=functools.partial(stream_state, stream),
            evaluate=functools.partial(evaluate_in_training, engine.model, config) if config.evaluation.is_on else None,
            interrupted=lambda: preemption.received is not None,
            flops_per_token=training_flops_per_token(config.model, config.data.sequence_length),
        )
        guard = Guard(config.guard, run.report)
        for microbatches in batches_from(state, config, stream, context, run.device, run.progress):
            lr = learning_rate(state.step, config.optim, config.schedule)
            told = preemption.received is not None
            if state.skips_next:
                report = skipped_step(lr, stop=told)
            else:
                report = train_step(engine, microbatches, lr, run.device, stop=told)
            state.count(report, samples=context.dp.size * sum(len(batch.indices) for batch in microbatches))
            diagnose = functools.partial(find_nonfinite, engine, microbatches, run.device)
            if wanted := guard.check(state, report, diagnose):
                rewind(run, engine, wanted)
                continue
            for hook in hooks:
                hook.on_step(state, report)
            if report.stop:
                return preemption.exit_code
    return None


def preflight(config: TrainConfig) -> tuple[TrainConfig, TokenStream, Start | None]:
    """Everything that can be checked before anything is started or written: the settings to run, the data, and on rank
    0 where to go on.

    Raises:
        ConfigError: with every problem found.
    """
    folder = RunFolder(config.run_dir)
    config, notes = settings_of_this_start(with_token_ids(config), folder)
    config = with_token_ids(config)  # settings frozen at a submission have none yet
    for note in notes:
        log.info(note)  # by one rank: the others log warnings alone
    problems = problems_in_training(config)
    stream = start = None
    try:
        stream = open_stream(config)
    except InputError as error:
        problems += [f"data.manifest: {problem}" for problem in error.problems]
    settings = problems_before_start(config, world_size(), stream and stream.manifest.tokenizer.vocab_size)
    problems += settings
    if is_first_process() and not settings:
        try:
            start = choose_start(config, folder, requeued=goes_on(folder))
            if config.init_from and start.checkpoint is None:
                start = dataclasses.replace(start, weights=folder_of_weights(config))
            problems += checkpoint_problems(config, start)
            if not problems:
                go_to(stream, start)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if is_first_process() and (line := other_world(config, os.environ)):
        log.warning(line)
    if is_first_process() and config.logging.progress and not torch.cuda.is_available():
        done = manifest.step if (manifest := start.manifest()) else 0
        if cost := cpu_cost(config, processes_here(), done):
            log.info(cost)
    return config, stream, start


def folder_of_weights(config: TrainConfig) -> Path:
    """The checkpoint or the released folder that init_from names.

    Raises:
        ConfigError: there is none, or it holds another model.
    """
    setting = f"init_from={config.init_from}"
    try:
        directory = resolve_checkpoint(config.init_from)
    except ConfigError:
        raise ConfigError(f"{setting}: no checkpoint, run or released model is there") from None
    with open_weights(directory) as weights:
        if changed := model_differences(weights.config, config.model):
            raise ConfigError([f"{setting} holds another model: {line}" for line in changed])
    return directory


def go_to(stream: TokenStream, start: Start) -> None:
    """Bring the stream to where a checkpoint was saved. Raises ConfigError when it was trained on other data."""
    manifest = start.manifest()
    if manifest is None or not manifest.training.get("stream"):  # initial values, or a checkpoint of weights alone
        return
    try:
        stream.restore(StreamState.from_json(json.dumps(manifest.training.get("stream", {}))))
    except InputError as error:
        where = f"checkpoint {start.checkpoint} was trained on other data"
        raise ConfigError([f"{where}: {problem}" for problem in error.problems]) from None


def batches_from(
    state: TrainingState,
    config: TrainConfig,
    stream: TokenStream,
    context: ParallelContext,
    device: torch.device,
    progress: Progress,
) -> Iterator[list[Batch]]:
    """This rank's microbatches of each step after `state.step`. A rewind sets `state.step` back between two steps: then
    the iterator begins again from there."""
    while state.step < config.last_step:
        with contextlib.closing(iter(open_batches(config, stream, context, state, device))) as steps:
            expected = state.step
            progress.at("data", expected + 1)
            for microbatches in steps:
                expected += 1
                progress.at("step")
                yield microbatches
                if state.step != expected:
                    break
                progress.at("data", expected + 1)


def open_batches(
    config: TrainConfig, stream: TokenStream, context: ParallelContext, state: TrainingState, device: torch.device
) -> DataPipeline:
    """This rank's microbatches of every step from `state` to the schedule's end."""
    begun, at = state.step, state.samples
    batch_of = functools.partial(batch_of_step, global_batch=config.data.global_batch, schedule=config.schedule)

    def plan(step: int) -> tuple[int, int] | None:
        # First sample of a step: the stream's position at `begun`, plus the samples of the steps since. With another
        # batch size than the checkpoint's this neither repeats nor skips a sample.
        first, samples = batch_of(step)
        first += at - batch_of(begun)[0]
        return (first, samples) if step < config.last_step else None

    return DataPipeline(
        lambda: stream,  # shards -> documents -> filter -> mixture -> packed samples (data_pipeline.stream.pipeline)
        batches(
            plan,
            micro_batch=config.data.micro_batch,
            rank=context.dp.rank,
            size=context.dp.size,
            workers=config.data.workers,
            step=begun,
            device=device,
        ),
    )


def stream_state(stream: TokenStream, next_sample: int) -> dict[str, Any]:
    """The stream's state at `next_sample`, with the damaged samples that each rank has met. Collective."""
    mine = stream.state(next_sample)
    states = [mine] * dist.get_world_size()
    if len(states) > 1:
        dist.all_gather_object(states, mine)
    return json.loads(StreamState.merge(states).to_json())


def show_sweep(run_dir: str, runs: list[str]) -> None:
    """One table and one picture of the sweep's jobs."""
    compare([Path(run) for run in runs], Path(run_dir) / "loss.png")


main = command(TrainConfig, "config", after_sweep=show_sweep)(train)

if __name__ == "__main__":
    run_program(main)
