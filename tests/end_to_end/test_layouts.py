"""The whole loop in layouts that meet nowhere else: data, evaluation, recomputation and saves, against one process."""

from pathlib import Path

import pytest

from tests.helpers.training import SMALL, losses, records, train_forked

# 33 tokens are shared unevenly by every number of ranks; documents end within slices and go on over several.
WORDS = (
    *SMALL,
    *("model.norm=rmsnorm", "model.lrpe=all", "engine.precision=fp32"),
    *("data.sequence_length=33", "data.micro_batch=2", "data.isolate_documents=true", "schedule.steps=4"),
    *("evaluation.every=2", "evaluation.max_documents=20", "checkpoint.every=2"),
)
LAYOUTS = {
    "cp2 zero2": ("parallel.cp=2", "engine=zero2"),
    "cp4 fsdp2": ("parallel.cp=4", "engine=fsdp2"),
    "tp2 fsdp2, every second block": ("parallel.tp=2", "engine=fsdp2", "engine.recompute_every=2"),
    "tp2 cp2 zero3, sequence parallel": (
        *("parallel.tp=2", "parallel.cp=2", "parallel.sequence_parallel=true", "engine=zero3"),
    ),
}


@pytest.fixture(scope="module")
def words(shards) -> tuple[str, ...]:
    return (*WORDS, f"data.manifest={shards}", f"evaluation.manifest={shards}")


def held_out(run: Path) -> dict[int, float]:
    return {record["step"]: record["heldout_loss"] for record in records(run, "heldout_loss")}


def test_a_transformer_trains_in_a_layout_as_in_one_process(words, tmp_path):
    of_linear_attention = ("model=demo", "model.lrpe=all")
    words = ("model=transformer_demo", *(word for word in words if word not in of_linear_attention))
    train_forked(1, *words, "engine=local", f"run_dir={tmp_path / 'alone'}")
    layout = LAYOUTS["tp2 fsdp2, every second block"]
    train_forked(4, *words, *layout, "parallel.sequence_parallel=true", f"run_dir={tmp_path / 'run'}")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert held_out(tmp_path / "run") == pytest.approx(held_out(tmp_path / "alone"), rel=1e-5)


def test_a_run_in_one_layout_after_another_trains_as_in_one_process(words, tmp_path):
    """Within the growth of the batch, with a batch left out that was named at the first start alone."""
    growing = (
        "data.global_batch=12",
        "schedule.steps=10",
        "schedule.ramp_from=4",
        "schedule.ramp_increment=4",
        "schedule.ramp_steps=6",
    )
    words = (*words, *growing, "checkpoint.keep=0")
    deepspeed = tmp_path / "deepspeed.json"  # buckets of a DeepSpeed file of one's own change nothing of the figures
    deepspeed.write_text('{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}')
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_forked(1, *words, "engine=local", f"run_dir={whole}", "data.skip_batches=[5]")
    cut = (*words, f"run_dir={run}", "engine.recompute=full")
    train_forked(4, *cut, *LAYOUTS["cp2 zero2"], "stop_after=3", "data.skip_batches=[5]")
    train_forked(4, *cut, *LAYOUTS["tp2 fsdp2, every second block"], "stop_after=6")
    own = f"engine.deepspeed_config={deepspeed}"
    train_forked(2, *cut, "engine=zero1", own, "checkpoint.resume=4", "stop_after=7")  # rewound by hand
    train_forked(4, *cut, *LAYOUTS["cp4 fsdp2"], "stop_after=8")
    train_forked(4, *cut, *LAYOUTS["tp2 cp2 zero3, sequence parallel"])
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    found, wanted = held_out(run), held_out(whole)  # a start that stops evaluates as well
    assert {step: found[step] for step in wanted} == pytest.approx(wanted, rel=1e-5)
    for key, relative in (("grad_norm", 1e-5), ("samples", 0), ("tokens", 0)):
        found, wanted = ([record[key] for record in records(of, key)] for of in (run, whole))
        assert found == pytest.approx(wanted, rel=relative, abs=0), key
    assert [record["step"] for record in records(run, "skipped")] == [5]
