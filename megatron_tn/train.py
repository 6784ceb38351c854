"""Train a TransNormerLLM: the command line and the whole loop.

python -m megatron_tn.train model=385m data.manifest=... run_dir=runs/mine                                one process
torchrun --nproc-per-node 8 -m megatron_tn.train model=7b parallel.tp=8 data.manifest=... run_dir=...     a node
"""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

import torch.distributed as dist

from data_pipeline.stream import BatchLoader, InputError, Manifest, StreamState, TokenStream
from megatron_tn.cli import command
from megatron_tn.config import ConfigError, TrainConfig
from megatron_tn.engine.build import build_engine
from megatron_tn.evaluate import held_out_loss
from megatron_tn.model.check import check_kernels
from megatron_tn.optim.schedule import batch_of_step, learning_rate
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.world import world_size
from megatron_tn.training.preemption import Preemption
from megatron_tn.training.preflight import frozen_config, problems_before_start
from megatron_tn.training.run import Run
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import train_step

log = logging.getLogger(__name__)


@command(TrainConfig, "config")
def main(config: TrainConfig) -> None:
    config, manifest = preflight(config)
    with Preemption() as preemption, Run(config) as run:
        context = ParallelContext.create(config.parallel.tp, config.parallel.cp)
        engine = build_engine(config, context, run.device)
        check_kernels(engine.model, run.device)
        state = run.restore(engine)
        run.keep_tokenizer(manifest.directory / manifest.tokenizer.file)
        stream, batches = open_batches(config, manifest, context, state)
        evaluate = functools.partial(held_out_loss, engine.model, config) if config.evaluation.manifest else None
        hooks = run.hooks(engine, stream_state=functools.partial(stream_state, stream), evaluate=evaluate)
        for microbatches in batches:
            lr = learning_rate(state.step, config.optim, config.schedule)
            report = train_step(engine, microbatches, lr, run.device, stop=preemption.received is not None)
            state.count(report, samples=context.dp.size * sum(len(batch.indices) for batch in microbatches))
            for hook in hooks:
                hook.on_step(state, report)
            if report.stop:
                break
        batches.close()


def preflight(config: TrainConfig) -> tuple[TrainConfig, Manifest]:
    """Everything that can be checked before anything is started or overwritten.

    Raises:
        ConfigError: with every problem found.
    """
    config, notes = frozen_config(config)
    for note in notes:
        log.warning(note)
    problems: list[str] = []
    manifest = None
    for name, path in (("data.manifest", config.data.manifest), ("evaluation.manifest", config.evaluation.manifest)):
        if not path and name == "data.manifest":
            problems.append("data.manifest is not set: name the manifest.json that `python -m data_pipeline.run` wrote")
        elif path:
            try:
                loaded = Manifest.load(path)
                manifest = manifest or loaded
            except InputError as error:
                problems += [f"{name}: {problem}" for problem in error.problems]
    problems += problems_before_start(config, world_size(), manifest and manifest.tokenizer.vocab_size)
    if problems:
        raise ConfigError(problems)
    return config, manifest


def open_batches(
    config: TrainConfig, manifest: Manifest, context: ParallelContext, state: TrainingState
) -> tuple[TokenStream, BatchLoader]:
    """The stream, and this rank's microbatches of every step from `state` to the schedule's end."""
    data = config.data
    stream = TokenStream(
        manifest,
        sequence_length=data.sequence_length,
        seed=config.seed,
        isolate_documents=data.isolate_documents,
        window=data.shuffle_window,
    )
    if state.stream:
        stream.restore(StreamState.from_json(json.dumps(state.stream)))
    begun, at = state.step, state.samples

    def plan(step: int) -> tuple[int, int] | None:
        # Counted from where the stream stands, so that a changed batch size neither repeats nor skips a sample.
        first, samples = batch_of_step(step, data.global_batch)
        first += at - batch_of_step(begun, data.global_batch)[0]
        return (first, samples) if step < config.last_step else None

    batches = BatchLoader(
        stream,
        plan,
        micro_batch=data.micro_batch,
        rank=context.dp.rank,
        size=context.dp.size,
        workers=data.workers,
        step=begun,
    )
    return stream, batches


def stream_state(stream: TokenStream, next_sample: int) -> dict[str, Any]:
    """The stream's state over all ranks, each of which may have met damaged samples of its own. Collective."""
    mine = stream.state(next_sample)
    states = [mine] * dist.get_world_size()
    if len(states) > 1:
        dist.all_gather_object(states, mine)
    return json.loads(StreamState.merge(states).to_json())


if __name__ == "__main__":
    main()
