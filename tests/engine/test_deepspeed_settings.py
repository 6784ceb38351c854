"""A DeepSpeed file of the user's own: merged where it is free, refused by name where it contradicts the run."""

import json

import pytest

from megatron_tn.config import ConfigError, TrainConfig, from_mapping, load, save
from megatron_tn.engine.deepspeed.settings import deepspeed_settings


def config(theirs, **engine) -> TrainConfig:
    data = {"global_batch": 12, "micro_batch": 2}
    return from_mapping(TrainConfig, {"data": data, "engine": {"deepspeed_config": theirs, **engine}})


def test_without_one_nothing_changes():
    assert deepspeed_settings(config(""), 2) == deepspeed_settings(config({}), 2)


def test_a_bucket_of_an_odd_number_of_elements_is_gathered_with_one_more():
    zero = deepspeed_settings(config({}, reduce_bucket_elements=1001), 2)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (1001, 1002)


def test_free_keys_are_laid_over_ours():
    theirs = {
        "zero_optimization": {"reduce_bucket_size": 7, "round_robin_gradients": True},
        "comms_logger": {"enabled": True},
        "prescale_gradients": False,
    }
    ours, merged = deepspeed_settings(config({}), 2), deepspeed_settings(config(theirs), 2)
    assert merged["zero_optimization"] == ours["zero_optimization"] | theirs["zero_optimization"]
    assert merged["comms_logger"] == {"enabled": True}
    assert merged["prescale_gradients"] is False


def test_keys_that_agree_and_auto_are_taken():
    theirs = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 3,
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "gradient_allreduce_op": "mean",
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}, "offload_param": None},
    }
    assert deepspeed_settings(config(theirs), 2) == deepspeed_settings(config({}), 2)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch_size": 8}, r"train_batch_size=8 contradicts data.global_batch, by which it is 12"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage=3 contradicts engine.zero_stage, .* is 1"),
        ({"bf16": {"enabled": False}}, r"bf16.enabled=False contradicts engine.precision"),
        ({"gradient_clipping": 5}, r"gradient_clipping=5 contradicts optim.clip_norm"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps=2 contradicts data.global_batch / "),
        ({"optimizer": {"type": "Adam"}}, r"optimizer=.* is not taken; its place is optim"),
        ({"fp16": {"enabled": True}}, r"fp16=.* is not taken; its place is engine.precision"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"offload_optimizer=.* is not taken"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, r"_gradients=True is not taken; .*gradient_dtype"),
        ({"zero_optimization": {"cpu_offload": True}}, r"zero_optimization.cpu_offload=True is not taken"),
        ({"bfloat16": {"enabled": True}}, r"bfloat16=.* is not taken; its place is engine.precision"),
        ({"zero_optimization": 2}, r"zero_optimization=2 must be a mapping"),
        ({"gradient_allreduce_op": "sum"}, r"gradient_allreduce_op='sum' contradicts the mean over ranks"),
        ({"managed_gradient_accumulation": False}, r"managed_gradient_accumulation=False contradicts this engine"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, r"bf16.bf16_master_.*=True contradicts the masters"),
        ({"zero_optimization": {"reduce_buckets": 3}}, r"DeepSpeed does not take it: .*reduce_buckets Extra inputs"),
        ({"zero_optimization": {"allgather_bucket_size": 7}}, r"allgather_bucket_size=7 must be even"),
        ({"elasticity": {"enabled": True}}, r"DeepSpeed does not take it: Elastic training has been removed"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_contradictions_are_refused_by_name(theirs, message):
    with pytest.raises(ConfigError, match=rf"engine.deepspeed_config: .*{message}"):
        deepspeed_settings(config(theirs), 2)


def test_a_file_is_read_once_and_kept_in_the_config(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"comms_logger": {"enabled": True}}))
    first = config(str(file))
    file.unlink()
    save(first, tmp_path / "config.json")
    assert load(tmp_path / "config.json").engine.deepspeed_config == {"comms_logger": {"enabled": True}}


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"engine.deepspeed_config.*'.*absent.json' is not a JSON file"):
        config(str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken.json' is not a JSON file"):
        config(str(tmp_path / "broken.json"))


def test_only_with_deepspeed():
    (problem,) = config({"comms_logger": {}}, name="local").problems(1)
    assert problem == "engine.deepspeed_config is set, but engine.name=local is not deepspeed"


def test_another_version_of_deepspeed_is_refused_with_what_to_do():
    from megatron_tn.engine.deepspeed.adapter import WRITTEN_FOR, check_version

    check_version(f"{WRITTEN_FOR}+cpu")
    with pytest.raises(ConfigError, match=rf"deepspeed 0\.20\.1 is installed, .*install deepspeed=={WRITTEN_FOR}"):
        check_version("0.20.1")


def test_deepspeeds_own_muon_is_imported_without_the_compiler():
    from megatron_tn.engine.deepspeed import adapter  # noqa: F401  # isort: skip
    from deepspeed.runtime.zero.muon import original_muon  # isort: skip

    assert not hasattr(original_muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")
