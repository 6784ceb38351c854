"""config.json of the released layouts <-> `ModelConfig`, by the file's model_type or the model's architecture."""

from pathlib import Path
from typing import Any

from megatron_tn.config import ConfigError, ModelConfig, read_mapping
from megatron_tn.model.registry import architecture
from megatron_tn.released import llama, transnormer

CONFIG_FILE = "config.json"
FAMILIES = {"transnormer": transnormer, "llama": llama}  # model_type -> its from_released and to_released


def read_config(directory: Path) -> ModelConfig:
    """The model of the released folder `directory`.

    Raises:
        FileNotFoundError: it has no config.json.
        ConfigError: config.json is damaged, of a run, or of a model that this package does not have; each line begins
            with the file's path.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}: not a model in the released layout")
    values = read_mapping(directory / CONFIG_FILE)
    if isinstance(values.get("model"), dict):  # the settings of a run
        raise ConfigError(
            f"{directory / CONFIG_FILE} is of a run, not of a model in the released layout: "
            "megatron_tn.loading.load_any_model loads a run's newest checkpoint, and convert export writes that layout"
        )
    try:
        return config_from_released(values)
    except ConfigError as error:
        raise ConfigError([f"{directory}/{problem}" for problem in error.problems]) from None


def trained_length(directory: Path) -> int | None:
    """Tokens of a sequence in training, of a LLaMA's config.json; None where it has none."""
    found = read_mapping(directory / CONFIG_FILE).get("max_position_embeddings")
    return found if isinstance(found, int) and found >= 1 else None


def config_from_released(values: dict[str, Any]) -> ModelConfig:
    """A released config.json as a `ModelConfig`.

    Raises:
        ConfigError: another model_type; a field is missing, or its value is not supported.
    """
    family = values.get("model_type", "transnormer")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"config.json: model_type={family!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[family].from_released(values)


def config_to_released(config: ModelConfig, sequence_length: int | None = None) -> dict[str, Any]:
    """Fields of a released config.json. sequence_length: of training, where it is known."""
    released = architecture(config).released
    fields = FAMILIES[released.model_type].to_released(config, sequence_length)
    return {"architectures": [released.class_name], "model_type": released.model_type, **fields}
