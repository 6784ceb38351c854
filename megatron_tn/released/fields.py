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
        elif not _is_whole(values[name]):
            problems.append(f"config.json: {name}={values[name]!r} is not a whole number")
        elif name in LAYERS and values[name] not in NUMBER:
            problems.append(f"config.json: {name}={values[name]} {NUMBER.describe(values[name])}")
    return problems


def flags_of(values: dict[str, Any], names: Iterable[str]) -> list[str]:
    """One line for each of the fields `names` that is there and neither true nor false, nor null, as an absent one."""
    there = {name: values[name] for name in names if values.get(name) is not None}
    return [
        f"config.json: {name}={value!r} is not true or false"
        for name, value in there.items()
        if not isinstance(value, bool)
    ]


def special_ids(values: dict[str, Any], pad: int = 0) -> tuple[dict[str, int], list[str]]:
    """pad_id, bos_id and eos_id of config.json, `pad`, 1 and 2 where a field is absent or null; and one line for each
    that is no whole number, such as a list of ends."""
    ids, problems = {}, []
    for name, absent in (("pad", pad), ("bos", 1), ("eos", 2)):
        given = values.get(f"{name}_token_id")
        ids[f"{name}_id"] = absent if given is None else given
        if given is not None and not _is_whole(given):
            problems.append(f"config.json: {name}_token_id={given!r} is not a whole number")
    return ids, problems


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def model_config(fields: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` of settings that config.json gave. Raises ConfigError, whose lines begin with config.json."""
    try:
        config = from_mapping(ModelConfig, fields)
    except ConfigError as error:
        raise ConfigError([f"config.json: {problem}" for problem in error.problems]) from None
    if problems := config.problems():
        raise ConfigError([f"config.json: {problem}" for problem in problems])
    return config
