"""Train a TransNormerLLM: the command line and the whole loop.

python -m megatron_tn.train model=385m data.manifest=... run_dir=runs/mine                                one process
torchrun --nproc-per-node 8 -m megatron_tn.train model=7b parallel.tp=8 data.manifest=... run_dir=...     a node
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tn import imports
from megatron_tn.training.preemption import Preemption, hold_signals

if __name__ == "__main__":
    hold_signals()
    imports.begin()  # before the imports below

# isort: split
import torch
from webdataset import DataPipeline

from data_pipeline.shards.remote import is_remote
from data_pipeline.stream import Batch, StreamState, TokenStream, batches
from kernels.dispatch import in_words
from megatron_tn.cli import command, run_program
from megatron_tn.config import TrainConfig
from megatron_tn.engine.build import DTYPES, build_engine
from megatron_tn.evaluate import evaluate_in_training
from megatron_tn.loading import open_weights
from megatron_tn.model.registry import check_kernels, parameter_count, training_flops_per_token
from megatron_tn.optim.schedule import batch_of_step, learning_rate
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import first_for_all, of_all
from megatron_tn.plot import compare
from megatron_tn.preflight import go_to, preflight
from megatron_tn.training.diagnose import find_nonfinite
from megatron_tn.training.guard import Guard
from megatron_tn.training.hooks.build import start_hooks
from megatron_tn.training.resume import agree_on_files
from megatron_tn.training.rewind import restore, rewind
from megatron_tn.training.run import Run
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import skipped_step, train_step
from megatron_tn.training.summary import show_start
from megatron_tn.training.watchdog import Progress

imports.done()


def train(config: TrainConfig) -> int | None:
    """Returns the exit code of a run that was told to stop before its end, and None for one that reached it."""
    given = config
    config, stream, start = preflight(config)
    with Preemption(joined=False) as preemption, Run(config, start, open_weights, given) as run:
        preemption.joined = True
        agree_on_files(local_manifests(config))
        context = ParallelContext.create(
            config.parallel.tp, config.parallel.cp, sequence_parallel=config.parallel.sequence_parallel
        )
        engine = build_engine(config, context, run.device)
        check_kernels(engine.model, run.device, DTYPES[config.engine.precision], config)
        state = restore(run, engine)
        go_to(config, stream, run.start)  # restore may have taken an older checkpoint, for one that is damaged
        tokenizer = stream.manifest.directory / stream.manifest.tokenizer.file
        first_for_all(functools.partial(run.folder.keep_tokenizer, tokenizer))
        if run.is_first and config.logging.progress and state.step < config.last_step:
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
            evaluate=functools.partial(evaluate_in_training, engine, config) if config.evaluation.is_on else None,
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
                preemption.stopped = True
                return preemption.exit_code
    return None


def local_manifests(config: TrainConfig) -> dict[str, str]:
    """Setting -> path of the shards' manifests that are no URLs."""
    manifests = {"data.manifest": config.data.manifest, "evaluation.manifest": config.evaluation.manifest}
    return {setting: path for setting, path in manifests.items() if path and not is_remote(path)}


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
    return json.loads(StreamState.merge(of_all(stream.state(next_sample))).to_json())


def show_sweep(run_dir: str, runs: list[str]) -> None:
    """One table and one picture of the sweep's jobs."""
    compare([Path(run) for run in runs], Path(run_dir) / "loss.png")


main = command(TrainConfig, "config", after_sweep=show_sweep)(train)

if __name__ == "__main__":
    run_program(main)
