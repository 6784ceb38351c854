"""Checks of config.json that the readers of all model families share (transnormer.py, llama.py)."""

from collections.abc import Iterable
from typing import Any

from megatron_tn.config import ConfigError, ModelConfig, from_mapping
from megatron_tn.config.model import NUMBER

LAYERS = ("decoder_layers", "num_hidden_layers")  # lists of this length are made of them


def whole_numbers(values: dict[str, Any], names: Iterable[str]) -> list[str]:
    """One line for each of the fields `names` that is missing or no whole number, or a number of layers past bounds."""
    problems = []
    for name in names:
        if name not in values:
            problems.append(f"config.json has no {name}")
        elif not isinstance(values[name], int):
            problems.append(f"config.json: {name}={values[name]!r} is not a whole number")
        elif name in LAYERS and values[name] not in NUMBER:
            problems.append(f"config.json: {name}={values[name]} {NUMBER.describe(values[name])}")
    return problems


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` of settings that config.json gave. Raises ConfigError, whose lines begin with config.json."""
    try:
        config = from_mapping(ModelConfig, fields)
    except ConfigError as error:
        raise ConfigError([f"config.json: {problem}" for problem in error.problems]) from None
    if problems := config.problems():
        raise ConfigError([f"config.json: {problem}" for problem in problems])
    return config
