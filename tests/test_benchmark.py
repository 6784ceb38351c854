"""The benchmark's rows on a CPU: the same tokens, times that add up, and the training command's own figures."""

import json

import pytest

from megatron_tn.benchmark import main
from tests.helpers.training import call


def test_rows_of_a_small_model(tmp_path):
    output = tmp_path / "rows.jsonl"
    code = call(
        main,
        "model=demo",
        "engine=local",
        "engine.precision=fp32",
        "data.sequence_length=32",
        "data.micro_batch=2",
        "data.global_batch=4",
        "benchmark.steps=2",
        "benchmark.loop_steps=14",
        f"run_dir={tmp_path}/run",
        f"benchmark.output={output}",
    )
    assert code == 0
    step, updated, loop = (json.loads(line) for line in output.read_text().splitlines())
    assert [row["part"] for row in (step, updated, loop)] == ["step", "with optimizer", "loop"]
    assert {row["tokens"] for row in (step, updated, loop)} == {128}
    assert 0 < step["milliseconds"] < updated["milliseconds"]
    for row in (step, updated, loop):
        assert row["tokens_per_second"] == pytest.approx(128e3 / row["milliseconds"])
        flops = 6 * row["parameters"] * row["tokens_per_second"]
        assert row["utilisation"] == pytest.approx(flops / (1e12 * row["matmul_tflops"]))
    records = [json.loads(line) for line in (tmp_path / "run/loop/log.jsonl").read_text().splitlines()]
    assert len(records) == 14
