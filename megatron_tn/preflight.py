"""What is checked of a run before anything is started or written: when it starts, and when it is submitted."""

import functools
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.shards.remote import is_remote
from data_pipeline.stream import InputError, StreamState, TokenStream
from megatron_tn.cli import is_first_process
from megatron_tn.config import ConfigError, TrainConfig, differences, to_stored
from megatron_tn.data import open_stream, with_token_ids
from megatron_tn.evaluate import problems_in_training
from megatron_tn.loading import open_weights, other_tokenizer, resolve_checkpoint
from megatron_tn.parallel.world import number, of_first, processes_here, world_size
from megatron_tn.planning.concerns import other_world
from megatron_tn.planning.host import cpu_cost
from megatron_tn.training.freeze import goes_on, settings_of_this_start
from megatron_tn.training.preflight import checkpoint_problems, model_differences, problems_before_start
from megatron_tn.training.resume import Start, choose_start
from megatron_tn.training.run_folder import RunFolder

log = logging.getLogger(__name__)

# Settings, or groups of them, that decide which samples the stream has.
OF_STREAM = (
    *("seed:", "data.manifest:", "data.sequence_length:", "data.shuffle_window:", "data.isolate_documents:"),
    *("data.filter:", "data.document_stages:", "data.mixture"),
)


def preflight(config: TrainConfig) -> tuple[TrainConfig, TokenStream, Start | None]:
    """Everything that can be checked before anything is started or written: the settings to run, the data, and on rank
    0 where to go on. Rank 0 reads the files. Collective.

    Raises:
        ConfigError: with every problem found.
    """
    once = functools.partial(of_first, timeout_s=config.distributed_timeout_s)
    folder = RunFolder(config.run_dir)
    config, notes, requeued = once(lambda: (*_settings(config, folder), goes_on(folder)))
    for note in notes:
        log.info(note)  # by one rank: the others log warnings alone
    stream, start, problems = inspect(config, world_size(), requeued=requeued, once=once)
    if problems:
        raise ConfigError(problems)
    if is_first_process() and (line := other_world(config, os.environ)):
        log.warning(line)
    if is_first_process() and config.logging.progress and not torch.cuda.is_available():
        done = manifest.step if (manifest := start.manifest) else 0
        if cost := cpu_cost(config, processes_here(), done):
            log.info(cost)
    return config, stream, start


def _settings(config: TrainConfig, folder: RunFolder) -> tuple[TrainConfig, list[str]]:
    config, notes = settings_of_this_start(with_token_ids(config), folder)
    return with_token_ids(config), notes  # settings frozen at a submission have no ids yet


def inspect(
    config: TrainConfig,
    world_size: int,
    *,
    requeued: bool = False,
    gpus: bool | None = None,
    once: Callable[[Callable[[], Any]], Any] = lambda read: read(),
) -> tuple[TokenStream | None, Start | None, list[str]]:
    """The data at the run's beginning, on rank 0 where the run goes on, and every problem, one line each.

    requeued: see `choose_start`. gpus: of a run on other machines, whether its processes have GPUs; None for a run that
    starts here. once: calls a function on rank 0 and returns on every rank what it returned.
    """
    problems = once(lambda: problems_in_training(config))
    data, stream, start = [], None, None
    try:
        of_url = is_remote(config.data.manifest)  # whose cache is each node's own
        stream = open_stream(config) if of_url else once(lambda: open_stream(config))
    except InputError as error:
        data = [f"data.{problem}" for problem in error.problems]
    vocabulary = stream and stream.manifest.tokenizer.vocab_size
    check = functools.partial(problems_before_start, config, world_size, vocabulary, gpus=gpus)
    of_rank_0 = once(lambda: (data, check()))
    if is_first_process() or any(of_rank_0):
        data, settings = of_rank_0
    else:
        settings = check()
        # Problems of this host alone: rank 0, which prints what ends the run, has none.
        for problem in data + settings:
            log.error("rank %d (host %s): %s", number("RANK", default=0), socket.gethostname(), problem)
    problems += data + settings

    def choose() -> None:
        nonlocal start
        found: list[str] = []
        try:
            start = choose_start(config, RunFolder(config.run_dir), requeued=requeued)
            if config.init_from and start.checkpoint is None:
                start = start.with_weights(folder_of_weights(config))
            elif config.init_from and not start.checkpoint.resolve().is_relative_to(Path(config.run_dir).resolve()):
                raise ConfigError(
                    f"init_from={config.init_from} and checkpoint.resume={config.checkpoint.resume}, of another run, "
                    "both say what the run begins from: leave one out"
                )
            found = checkpoint_problems(config, start) + weights_of_other_tokens(config, start, stream)
            if not problems and not found:
                go_to(config, stream, start)
        except ConfigError as error:
            found = error.problems
        if problems or found:  # told to all ranks before rank 0, which may serve their store, ends
            raise ConfigError([*problems, *found])

    try:
        once(choose)
    except ConfigError as error:
        problems = list(dict.fromkeys([*problems, *error.problems]))
    except OSError:
        if not problems:  # a run_dir that is no folder, or cannot be read, is among the problems
            raise
    return stream, start, problems


def folder_of_weights(config: TrainConfig) -> Path:
    """The checkpoint or the released folder that init_from names.

    Raises:
        ConfigError: there is none, or it holds another model.
    """
    setting, directory = f"init_from={config.init_from}", resolve_checkpoint(config.init_from, "init_from")
    try:
        with open_weights(directory) as weights:
            changed = model_differences(weights.config, config.model)
    except ConfigError as error:
        raise ConfigError([f"{setting} cannot be read: {problem}" for problem in error.problems]) from None
    if changed:
        raise ConfigError([f"{setting} holds another model: {line}" for line in changed])
    return directory


def weights_of_other_tokens(config: TrainConfig, start: Start, stream: TokenStream | None) -> list[str]:
    """One line where a run's first weights were trained with another tokenizer than the data is made with: init_from's,
    or those of a checkpoint that an import made. Other checkpoints belong to their data (`go_to`)."""
    if config.init_from and start.checkpoint is None:
        named, weights = "init_from", config.init_from
    elif start.manifest is not None and not start.manifest.training.get("stream"):
        named, weights = "checkpoint", str(start.checkpoint)
    else:
        return []
    data = f"data.manifest={config.data.manifest}"
    return [] if stream is None else other_tokenizer(stream.manifest, data, "", weights, named)


def go_to(config: TrainConfig, stream: TokenStream, start: Start) -> None:
    """Bring the stream to where a checkpoint was saved. Raises ConfigError when it was trained on other data; the line
    names the settings that make it other, or else says what may have changed in their files."""
    manifest = start.manifest
    if manifest is None or not manifest.training.get("stream"):  # initial values, or a checkpoint of weights alone
        return
    try:
        stream.restore(StreamState.from_json(json.dumps(manifest.training.get("stream", {}))))
    except InputError as error:
        stored, mine = manifest.config, to_stored(config)
        old, new = ({"seed": of.get("seed"), "data": of["data"]} for of in (stored, mine))
        changed = [line for line in differences(old, new) if line.startswith(OF_STREAM)]
        where = f"checkpoint {start.checkpoint} was trained on other data"
        instead = f"begin a new run from its weights, with init_from={start.checkpoint} and another run_dir"
        found = ", ".join(changed or error.problems)
        raise ConfigError(f"{where}: {found}; train on its data, or {instead}") from None
