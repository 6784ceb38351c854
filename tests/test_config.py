"""Settings: strict, all problems at once, and every file in conf/ holds."""

import dataclasses
from collections.abc import Iterator

import hydra
import pytest
from omegaconf import OmegaConf

import megatron_tn.train
from megatron_tn import cli
from megatron_tn.config import (
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    describe,
    device_problems,
    differences,
    from_mapping,
    known_keys,
    load,
    save,
    to_mapping,
)

GROUPS = {"model", "parallel", "engine", "data", "optim", "schedule", "logging", "cluster", "experiment"}
CHOICES = [
    f"{group}={path.relative_to(cli.CONF / group).with_suffix('')}"
    for group in sorted(GROUPS)
    for path in sorted((cli.CONF / group).rglob("*.yaml"))
]


def compose(*overrides: str) -> TrainConfig:
    assert megatron_tn.train.main  # importing it registers the schema
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        return from_mapping(TrainConfig, OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_in_conf_composes(choice):
    config = compose(choice)
    assert isinstance(config, TrainConfig)
    if not choice.startswith(("parallel", "experiment")):
        assert config.problems(world_size=1) == []


def test_one_spelling_of_the_command_line():
    config = compose("model=7b", "parallel.tp=8", "parallel.cp=1", "engine=zero1", "cluster=a100_80g", "nodes=16")
    assert (config.model.layers, config.parallel.tp, config.engine.zero_stage, config.nodes) == (30, 8, 1, 16)
    assert config.cluster.gpu_memory_gib == pytest.approx(80, rel=0.1)


def test_mappings_come_back_as_they_were(tmp_path):
    config = compose("model=demo", "model.lrpe=[true,false,true,false]")
    save(config, tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config == from_mapping(TrainConfig, to_mapping(config))


def test_all_bad_keys_and_values_are_in_one_error():
    bad = {"model": {"emb_dim": 3, "act": "gelu"}, "engine": {"zero_stage": 4}, "learning_rate": 1, "nodes": 0}
    bad["schedule"] = {"steps": False}
    with pytest.raises(ConfigError) as caught:
        from_mapping(TrainConfig, bad)
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    assert "schedule.steps=False must not be a boolean: it would be read as 0" in text
    assert "nodes=0 must be from 1 to 1000000" in text
    assert "unknown setting model.emb_dim; did you mean model.embed_dim" in text
    assert "model.act='gelu'" in text
    assert "engine.zero_stage=4" in text
    assert "unknown setting learning_rate" in text


def numbers(values: dict, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings below `values` that are numbers."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif type(value) in (int, float):
            yield f"{prefix}{key}"


KINDS = [kind for kind, _ in describe.COMMANDS.values()]
NUMBERS = [(kind, name, True) for kind in KINDS for name in numbers(to_mapping(kind()))]
NUMBERS += [  # in unions, lists and mappings
    (TrainConfig, "cluster.bf16_tflops", True),
    (TrainConfig, "checkpoint.resume", True),
    (TrainConfig, "cluster.matrix_rates", [[16, True]]),
    (TrainConfig, "data.skip_batches", [7, True]),
    (TrainConfig, "data.mixture.epochs.web", True),
]


def test_no_number_is_given_as_a_boolean():
    for kind, name, given in NUMBERS:
        for key in reversed(name.split(".")):
            given = {key: given}
        with pytest.raises(ConfigError, match=rf"^{name}=True must not be a boolean: it would be read as 1(\.0)?$"):
            from_mapping(kind, given)


@pytest.mark.parametrize(
    ("change", "world", "problem"),
    [
        ({"parallel": ParallelConfig(tp=3)}, 3, "model.heads=8 is not divisible by parallel.tp=3"),
        (
            {"parallel": ParallelConfig(sequence_parallel=True)},
            1,
            "parallel.sequence_parallel=true shares tokens out over tensor-parallel ranks, but parallel.tp=1",
        ),
        ({"parallel": ParallelConfig(tp=0)}, 1, "parallel.tp=0 must be at least 1"),
        ({"parallel": ParallelConfig(tp=2)}, 3, "world size 3 is not a multiple of parallel.tp=2 x parallel.cp=1 = 2"),
        (
            {"parallel": ParallelConfig(cp=4), "data": DataConfig(sequence_length=3)},
            4,
            "data.sequence_length=3 is smaller than parallel.cp=4",
        ),
        ({"data": DataConfig(global_batch=6, micro_batch=4)}, 1, "data.global_batch=6 is not a multiple of"),
        ({"data": DataConfig(sequence_length=0)}, 1, "data.sequence_length=0 must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_relations_that_do_not_hold_are_named(change, world, problem):
    found = dataclasses.replace(TrainConfig(), **change).problems(world)
    assert any(problem in line for line in found), found


OUT_OF_BOUNDS = {
    "model.heads=0": "must be from 1 to 2048",
    "model.eos_id=-1": "must be at least 0",
    "model.norm_eps=inf": "must be finite",
    "model.init_std=nan": "must be at least 0, and finite",
    "optim.lr=0.0": "must be above 0, and finite",
    "optim.beta1=1.0": "must be from 0 to below 1",
    "schedule.min_lr_ratio=nan": "must be from 0 to 1",
    "guard.spike_window=1": "must be at least 2",
    "data.shuffle_window=10000000000000000000": "must be at most 9223372036854775807, the largest integer of 64 bits",
    "cluster.bf16_tflops=-1.0": "must be above 0, and finite, or null where it is not known",
    "seed=-1": "must be from 0 to 18446744073709551615",
    "hang_timeout_s=-1": "must be at least 0",
}


def test_every_value_out_of_bounds_is_named_beside_the_relations_that_still_have_a_meaning():
    values = {"parallel": {"tp": 5}, "model": {"glu_dim": 3, "embed_dim": 1023}}
    for setting in OUT_OF_BOUNDS:
        name, _, value = setting.partition("=")
        group, _, field = name.rpartition(".")
        (values.setdefault(group, {}) if group else values)[field] = float(value) if "." in value else value
    found = from_mapping(TrainConfig, values).problems(world_size=7)
    assert sorted(found[: len(OUT_OF_BOUNDS)]) == sorted(f"{s} {must}" for s, must in OUT_OF_BOUNDS.items())
    assert not any("divisible by model.heads" in line for line in found)  # there are no heads to divide by
    assert "world size 7 is not a multiple of parallel.tp=5 x parallel.cp=1 = 5" in found


def test_a_captured_graph_needs_a_device_that_is_known_to_be_there():
    config = dataclasses.replace(TrainConfig(), engine=EngineConfig(name="local", cuda_graph=True))
    assert config.problems(1) == []  # a plan is made without the device
    assert device_problems(config, cuda=True) == []
    assert "engine.cuda_graph=true needs a CUDA device" in device_problems(config, cuda=False)[0]


def test_what_a_transformer_does_not_have_is_refused_by_name():
    transformer = ModelConfig(architecture="transformer", norm="rmsnorm", glu_act="silu", scale_embedding=False)
    assert TrainConfig(model=transformer, parallel=ParallelConfig(tp=2)).problems(2) == []
    (problem,) = TrainConfig(model=transformer, parallel=ParallelConfig(cp=2)).problems(2)
    assert "parallel.cp=2 does not go with model.architecture=transformer" in problem
    found = dataclasses.replace(transformer, norm="simplermsnorm", decay="paper", heads=1024).problems()
    found = {line.partition(" ")[0]: line for line in found}
    assert set(found) == {"model.norm=simplermsnorm", "model.decay=paper", "model.embed_dim=1024"}
    assert "model.architecture=transformer has model.decay=released" in found["model.decay=paper"]
    assert "must be even: RoPE rotates pairs of channels" in found["model.embed_dim=1024"]


def test_differences_name_each_setting():
    old, new = to_mapping(TrainConfig()), to_mapping(TrainConfig(seed=3, data=DataConfig(global_batch=8)))
    assert differences(old, new) == ["data.global_batch: 64 -> 8", "seed: 0 -> 3"]


def test_every_setting_is_known_by_its_dotted_name():
    known = known_keys(TrainConfig)
    assert {"run_dir", "model.embed_dim", "logging.wandb.mode", "cluster.gpu_memory_gib"} <= set(known)


def test_the_settings_page_is_that_of_today():
    page = (cli.CONF.parent / "docs" / "settings.md").read_text()
    assert page == describe.page(), "make it again: python -m megatron_tn.config.describe > docs/settings.md"


def test_every_setting_has_a_meaning():
    assert [setting.name for kind in KINDS for setting in describe.settings(kind) if not setting.meaning] == []
