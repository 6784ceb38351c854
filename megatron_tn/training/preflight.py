"""Checks before the run starts or writes anything; they report all problems at once."""

import os
from dataclasses import replace

import torch

from megatron_tn.config import (
    ConfigError,
    ModelConfig,
    TrainConfig,
    device_problems,
    from_mapping,
    to_mapping,
)
from megatron_tn.engine.deepspeed.settings import deepspeed_settings
from megatron_tn.optim.build import OPTIMIZERS, kernel_problems
from megatron_tn.parallel.float8_layers import products_problems
from megatron_tn.parallel.world import device_here, processes_here
from megatron_tn.planning.host import host_memory_problems, step_memory_problems
from megatron_tn.planning.remedies import memory_problems
from megatron_tn.training.resume import Start
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState


def problems_before_start(
    config: TrainConfig, world_size: int, tokenizer_vocab: int | None, *, gpus: bool | None = None
) -> list[str]:
    """One line per problem that would make the run fail later. tokenizer_vocab: of the shards' tokenizer, if known.
    gpus: of a run on other machines, whether its processes have GPUs; None for a run that starts here."""
    cuda = torch.cuda.is_available() if gpus is None else gpus
    settings = [*config.problems(world_size), *device_problems(config, cuda=cuda)]
    found = list(settings)
    if gpus is None:
        found += kernel_problems(config.optim) + products_problems(config.engine.products, device_here())
    if tokenizer_vocab is not None and config.model.vocab_size < tokenizer_vocab:
        found.append(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {tokenizer_vocab} entries of the "
            f"tokenizer that made data.manifest={config.data.manifest}"
        )
    if (other := RunFolder(config.run_dir).other_use()) is not None:
        found.append(f"run_dir={config.run_dir} is the folder of {other}: name another for the run")
    checkpoints = RunFolder(config.run_dir).checkpoints.absolute()
    existing = next(folder for folder in (checkpoints, *checkpoints.parents) if folder.exists())
    if not existing.is_dir():
        found.append(f"run_dir={config.run_dir} cannot be written: {existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        found.append(f"run_dir={config.run_dir} cannot be written: no permission in {existing}")
    if settings:  # an invalid layout has no memory plan
        return found
    try:
        if config.engine.name == "deepspeed":
            deepspeed_settings(config, world_size // (config.parallel.tp * config.parallel.cp))
        if gpus is None:
            found += step_memory_problems(config, world_size, processes_here())
        if gpus is None and not cuda and config.cluster.gpu_memory_gib <= 0:
            return [*found, *host_memory_problems(config, world_size, processes_here())]
        return [*found, *memory_problems(config, world_size)]
    except ConfigError as error:
        return [*found, *error.problems]


def checkpoint_problems(config: TrainConfig, start: Start) -> list[str]:
    """Reasons, one line each, why a run with these settings cannot resume from `start`'s checkpoint."""
    manifest, directory = start.manifest, start.checkpoint
    if manifest is None:
        return []
    # A setting added after the checkpoint was written has its default value there.
    changed = model_differences(from_mapping(ModelConfig, manifest.config["model"]), config.model)
    found = [f"checkpoint {directory} holds another model: {line}" for line in changed]
    kinds = set(manifest.state_kinds)
    if kinds and kinds != set(OPTIMIZERS[config.optim.name].state_kinds):
        saved_by = [f"optim.name={name}" for name, entry in OPTIMIZERS.items() if kinds == set(entry.state_kinds)]
        found.append(
            f"optim.name={config.optim.name} cannot go on from checkpoint {directory}, whose moments are those of "
            f"{', '.join(saved_by or ['another optimizer', *sorted(kinds)])}: go on with that one, or begin a new run "
            f"from the weights, with init_from={directory} and another run_dir"
        )
    if manifest.step > config.schedule.steps:
        found.append(f"checkpoint {directory} is at step {manifest.step}, above schedule.steps={config.schedule.steps}")
    try:
        state = TrainingState.from_json(manifest.training)
    except ConfigError as error:
        return [*found, *(f"checkpoint {directory} is damaged: training: {problem}" for problem in error.problems)]
    state.add_ledger(start.ledger)
    if trained := sorted(batch for batch in config.data.skipped if batch <= manifest.step and batch not in state.skip):
        found.append(
            f"data.skip_batches: checkpoint {directory} has trained on batch {trained[0]} already; resume from one "
            f"before it, with checkpoint.resume=STEP and a step below {trained[0]}"
        )
    return found


def model_differences(stored: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Settings, as 'model.NAME=STORED, not WANTED', for which stored weights do not fit a model. None for a model whose
    settings contradict each other: that is told of them."""
    if wanted.problems():
        return []
    if contradictions := stored.problems():
        return contradictions
    # A released config.json lists the layers that apply LRPE.
    old, new = (to_mapping(replace(model, lrpe=model.lrpe_layers)) for model in (stored, wanted))
    # Ids are those of the data's tokenizer; older checkpoints have the defaults, whatever their tokenizer's were.
    free = ("name", "init_std", "bos_id", "eos_id", "pad_id")
    differing = (name for name in old if name not in free and old[name] != new[name])
    return [f"model.{name}={old[name]!r}, not {new[name]!r}" for name in differing]
