"""Train a TransNormerLLM: the command line and the whole loop.

python -m megatron_tn.train model=385m data.manifest=... run_dir=runs/mine                                one process
torchrun --nproc-per-node 8 -m megatron_tn.train model=7b parallel.tp=8 data.manifest=... run_dir=...     a node
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from webdataset import DataPipeline

from data_pipeline.stream import (
    Batch,
    InputError,
    Manifest,
    Mixture,
    StreamState,
    TokenStream,
    batches,
    build_stream,
    load_document_stage,
    load_filter,
)
from megatron_tn.checkpoint.manifest import Manifest as Checkpoint
from megatron_tn.cli import command, run_program
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.engine.build import DTYPES, build_engine
from megatron_tn.evaluate import held_out_loss, problems_of_held_out
from megatron_tn.model.registry import check_kernels, training_flops_per_token
from megatron_tn.optim.schedule import batch_of_step, learning_rate
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import world_size
from megatron_tn.training.diagnose import find_nonfinite
from megatron_tn.training.guard import Guard
from megatron_tn.training.preemption import Preemption
from megatron_tn.training.preflight import checkpoint_to_resume, frozen_config, problems_before_start
from megatron_tn.training.run import Run, anywhere
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import skipped_step, train_step
from megatron_tn.training.watchdog import Progress

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> bool:
    """Returns whether it was told to stop."""
    config, stream = preflight(config)
    told_to_stop = False
    with Preemption() as preemption, Run(config) as run:
        context = ParallelContext.create(
            config.parallel.tp, config.parallel.cp, sequence_parallel=config.parallel.sequence_parallel
        )
        engine = build_engine(config, context, run.device)
        check_kernels(engine.model, run.device, DTYPES[config.engine.precision])
        state = run.restore(engine)
        run.keep_tokenizer(stream.manifest.directory / stream.manifest.tokenizer.file)
        evaluate = functools.partial(held_out_loss, engine.model, config) if config.evaluation.manifest else None
        hooks = run.hooks(
            engine,
            stream_state=functools.partial(stream_state, stream),
            evaluate=evaluate,
            interrupted=lambda: preemption.received is not None,
            flops_per_token=training_flops_per_token(config.model, config.data.sequence_length),
        )
        guard = Guard(config.guard, run.report)
        for microbatches in batches_from(state, config, stream, context, run.device, run.progress):
            lr = learning_rate(state.step, config.optim, config.schedule)
            if state.skips_next:
                report = skipped_step(lr, stop=anywhere(preemption.received is not None))
            else:
                report = train_step(engine, microbatches, lr, run.device, stop=preemption.received is not None)
            state.count(report, samples=context.dp.size * sum(len(batch.indices) for batch in microbatches))
            diagnose = functools.partial(find_nonfinite, engine, microbatches, run.device)
            if rewind := guard.check(state, report, diagnose):
                run.rewind(engine, rewind)
                continue
            for hook in hooks:
                hook.on_step(state, report)
            if told_to_stop := report.stop:
                break
    return told_to_stop


def preflight(config: TrainConfig) -> tuple[TrainConfig, TokenStream]:
    """Everything that can be checked before anything is started or overwritten; the data, opened where it goes on.

    Raises:
        ConfigError: with every problem found.
    """
    config, notes = frozen_config(config)
    for note in notes:
        log.info(note)  # by one rank: the others log warnings alone
    problems: list[str] = []
    stream = None
    try:
        if config.evaluation.manifest:
            held_out, path = Manifest.load(config.evaluation.manifest), config.evaluation.manifest
            problems += problems_of_held_out(held_out, f"evaluation.manifest={path}", config.model.vocab_size)
    except InputError as error:
        problems += [f"evaluation.manifest: {problem}" for problem in error.problems]
    try:
        stream = open_stream(config)
    except InputError as error:
        problems += [f"data.manifest: {problem}" for problem in error.problems]
    problems += problems_before_start(config, world_size(), stream and stream.manifest.tokenizer.vocab_size)
    if not problems and (start := checkpoint_to_resume(config)):
        try:
            stream.restore(StreamState.from_json(json.dumps(Checkpoint.read(start).training.get("stream", {}))))
        except InputError as error:
            problems += [f"checkpoint {start} was trained on other data: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return config, stream


def open_stream(config: TrainConfig) -> TokenStream:
    """The data as the config describes it, from its beginning.

    Raises:
        InputError: there is none, it is damaged, or the filter or mixture does not fit it.
    """
    data = config.data
    if not data.manifest:
        raise InputError("not set: name the manifest.json that `python -m data_pipeline.run` wrote")
    return build_stream(
        Manifest.load(data.manifest, cache_bytes=data.cache_bytes),
        sequence_length=data.sequence_length,
        seed=config.seed,
        isolate_documents=data.isolate_documents,
        window=data.shuffle_window,
        max_damaged=data.max_damaged,
        filter=load_filter(data.filter) if data.filter else None,
        document_stages=[load_document_stage(name) for name in data.document_stages],
        mixture=Mixture.parse(data.mixture) if data.mixture else None,
    )


def batches_from(
    state: TrainingState,
    config: TrainConfig,
    stream: TokenStream,
    context: ParallelContext,
    device: torch.device,
    progress: Progress,
) -> Iterator[list[Batch]]:
    """This rank's microbatches of every step from `state` on; after a rewind, which sets `state` back, from there."""
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
        # Counted from where the stream stands, so that a changed batch size neither repeats nor skips a sample.
        first, samples = batch_of(step)
        first += at - batch_of(begun)[0]
        return (first, samples) if step < config.last_step else None

    return DataPipeline(
        lambda: stream,  # shards -> documents -> filter -> mixture -> packing: see data_pipeline.stream.pipeline
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
    """The stream's state over all ranks, each of which may have met damaged samples of its own. Collective."""
    mine = stream.state(next_sample)
    states = [mine] * dist.get_world_size()
    if len(states) > 1:
        dist.all_gather_object(states, mine)
    return json.loads(StreamState.merge(states).to_json())


main = command(TrainConfig, "config")(train)

if __name__ == "__main__":
    run_program(main)
