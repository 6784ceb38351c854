"""The data of a training run, as the settings data.* name it: the token stream, and the tokenizer of its shards."""

import dataclasses
import functools
from pathlib import Path

from data_pipeline.shards.manifest import TokenizerInfo
from data_pipeline.stream import (
    InputError,
    Manifest,
    Mixture,
    TokenStream,
    build_stream,
    load_document_stage,
    load_filter,
)
from megatron_tn.config import ConfigError, ModelConfig, TrainConfig, out_of_bounds


def with_token_ids(config: TrainConfig) -> TrainConfig:
    """The settings with model.bos_id, eos_id and pad_id of the tokenizer that made data.manifest: those that the shards
    hold, that generation begins and ends with, and that an export names.

    Raises:
        ConfigError: a setting that is not at its default names another id.
    """
    tokenizer = tokenizer_of(config.data.manifest)
    if tokenizer is None or tokenizer.vocab_size > config.model.vocab_size:  # refused later, with its own message
        return config
    ids = {"bos_id": tokenizer.bos, "eos_id": tokenizer.eos, "pad_id": tokenizer.pad}
    default = ModelConfig()
    problems = [
        f"model.{name}={getattr(config.model, name)} is not the id {right} of the tokenizer that made data.manifest="
        f"{config.data.manifest}; leave the setting out"
        for name, right in ids.items()
        if getattr(config.model, name) not in (right, getattr(default, name))
    ]
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **ids))


@functools.lru_cache
def tokenizer_of(manifest: str) -> TokenizerInfo | None:
    """What shards' manifest.json says of their tokenizer; None where it cannot be read, which `open_stream` reports."""
    try:
        return Manifest.load(manifest).tokenizer
    except InputError:
        return None


def tokenizer_file(manifest: str) -> Path | None:
    """The tokenizer.json of shards; None where it, or their manifest.json, cannot be found."""
    try:
        shards = Manifest.load(manifest)
    except InputError:
        return None
    file = shards.directory / shards.tokenizer.file
    return file if file.is_file() else None


def other_tokenizer(held_out: Manifest, config: TrainConfig) -> list[str]:
    """One line where held-out shards and training shards were made with different tokenizers."""
    ours = tokenizer_of(config.data.manifest)
    if ours is None or ours.sha256 == held_out.tokenizer.sha256:
        return []
    return [
        f"evaluation.manifest={config.evaluation.manifest} and data.manifest={config.data.manifest} were made with "
        "different tokenizers"
    ]


def open_stream(config: TrainConfig) -> TokenStream:
    """The token stream that `config.data` describes, at its beginning.

    Raises:
        InputError: data.manifest is not set, shards are missing or damaged, or the filter or mixture does not fit them.
            Each line begins with a setting's name, without "data."; there is none for settings out of bounds.
    """
    data = config.data
    if not data.manifest:
        raise InputError("manifest: not set: name the manifest.json that `python -m data_pipeline.run` wrote")
    manifest = Manifest.load(data.manifest, cache_bytes=data.cache_bytes)
    options = {
        "filter": load_filter(data.filter) if data.filter else None,
        "document_stages": [load_document_stage(name) for name in data.document_stages],
        "mixture": Mixture.parse(data.mixture) if data.mixture else None,
    }
    if out_of_bounds(config):
        raise InputError()  # `config.problems` names them, by the names of the settings
    return build_stream(
        manifest,
        sequence_length=data.sequence_length,
        seed=config.seed,
        isolate_documents=data.isolate_documents,
        window=data.shuffle_window,
        max_damaged=data.max_damaged,
        **options,
    )
