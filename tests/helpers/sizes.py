"""The released family's sizes, as the paper and the released files state them, independent of conf/."""

import functools
from typing import NamedTuple

import hydra
from omegaconf import OmegaConf

from megatron_tn import cli


class Size(NamedTuple):
    shape: tuple[int, int, int, int, bool]  # layers, embed_dim, heads, glu_dim, no_scale_embedding
    parameters: float
    tolerance: float  # 0 where the count was read off a released file


SIZES = {
    "385m": Size((24, 1024, 8, 2816, False), 0.40e9, 0.02),
    "1b": Size((16, 2048, 16, 5632, False), 1_020_266_496, 0),
    "3b": Size((32, 2560, 20, 6912, True), 2.9e9, 0.02),
    "7b": Size((30, 4096, 32, 11008, True), 6_836_719_616, 0),
    "13b": Size((36, 5120, 40, 13824, True), 12.7e9, 0.02),
    "65b": Size((72, 8192, 64, 22016, True), 63.6e9, 0.02),
    "175b": Size((88, 12288, 96, 32768, True), 173e9, 0.02),
}


def compose_model(name: str) -> dict:
    """The model section of a run with model=`name`."""
    return dict(_composed(name))


@functools.cache
def _composed(name: str) -> dict:
    import megatron_tn.train  # noqa: F401  registers the schema

    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        return OmegaConf.to_container(hydra.compose("config", overrides=[f"model={name}"]).model)
