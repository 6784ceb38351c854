"""Scores every document of a folder of shards by a model, for self-cleaning: nats per token and per byte.

python -m megatron_tn.score checkpoint=runs/eval manifest=data/train/manifest.json
torchrun --nproc-per-node 8 -m megatron_tn.score ...                                 each process takes every 8th shard

Scores are written beside the shards, once: a shard that has those of this model is passed over, so that a run that was
killed goes on where it stopped. `data.filter` and `python -m data_pipeline.audit draw` read them by their name.
"""

import hashlib
import re
from pathlib import Path

import torch

from data_pipeline.selfclean.score import score_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.stream import InputError
from megatron_tn.checkpoint.manifest import MANIFEST
from megatron_tn.cli import command
from megatron_tn.config import ConfigError, ScoreConfig, out_of_bounds
from megatron_tn.evaluation.progress import DocumentProgress
from megatron_tn.evaluation.scorer import ModelScorer
from megatron_tn.loading import load_any_model, memory_is_named, other_tokenizer, resolve_checkpoint
from megatron_tn.parallel.world import number


@command(ScoreConfig, "score")
def main(config: ScoreConfig) -> None:
    manifest, name = checked(config)
    rank, size, local = (
        number("RANK", default=0),
        number("WORLD_SIZE", default=1, least=1),
        number("LOCAL_RANK", default=0),
    )
    device = config.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{local}"
    model = load_any_model(config.checkpoint, device, config.precision, fp8_weights=config.fp8_weights)
    if manifest.tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"manifest={config.manifest} was made with a tokenizer of {manifest.tokenizer.vocab_size} entries, more "
            f"than model.vocab_size={model.config.vocab_size} of checkpoint={config.checkpoint}"
        )
    if problems := other_tokenizer(manifest, f"manifest={config.manifest}", "", config.checkpoint):
        raise ConfigError(problems)
    mine = manifest.shards[rank::size]
    totals = sum(shard.documents for shard in mine), sum(shard.tokens for shard in mine)
    with DocumentProgress(f"score {name}", *totals, hidden=rank > 0) as shown:
        scorer = ModelScorer(model, batch_tokens=config.batch_tokens, progress=shown.advance)
        try:
            with memory_is_named(f"batch_tokens={config.batch_tokens}"):
                scored = score_shards(
                    manifest,
                    scorer,
                    name,
                    rank=rank,
                    size=size,
                    passed_over=lambda shard: shown.pass_over(shard.documents, shard.tokens),
                )
        except InputError as error:
            raise ConfigError(error.problems) from None
    whose = f" (process {rank} of {size})" if size > 1 else ""
    print(f"{name}: {scored} documents scored{whose}; the others had scores already")


def checked(config: ScoreConfig) -> tuple[Manifest, str]:
    """The shards, and the name that the scores will have.

    Raises:
        ConfigError: with every problem found.
    """
    problems, manifest, name = list(out_of_bounds(config).values()), None, config.name
    if name and not re.fullmatch("[A-Za-z0-9_-]{1,60}", name):
        problems.append(f"name={name!r} must be up to 60 letters, digits, _ or -: it becomes part of file names")
    try:
        if not config.manifest:
            raise InputError("manifest: not set: name the manifest.json of the shards to score")
        manifest = Manifest.load(config.manifest)
        problems += manifest.score_problems(f"manifest={config.manifest}")
    except InputError as error:
        problems += error.problems
    try:
        directory = resolve_checkpoint(config.checkpoint)
        name = name or f"eval-{model_hash(directory)[:16]}{'-fp8' if config.fp8_weights else ''}"
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return manifest, name


def model_hash(directory: Path) -> str:
    """sha256 of what decides a model's scores, hex: a checkpoint's manifest, which holds a digest of every file, or a
    released model's config and weights."""
    files = [directory / MANIFEST]
    if not files[0].is_file():
        files = [
            directory / "config.json",
            *(sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))),
        ]
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


if __name__ == "__main__":
    main()
