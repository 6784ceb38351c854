"""The benchmark's rows on a CPU: the same tokens, times that add up, and the training loop's own figures."""

import json
import sys
from unittest import mock

import pytest
import torch

from kernels.bench import rows
from megatron_tn.benchmark import main
from megatron_tn.benchmarking import block, checkpoint, decode
from megatron_tn.benchmarking.local_copies import world_of_copies
from megatron_tn.benchmarking.peers import llama, retnet
from megatron_tn.config import ClusterConfig, ModelConfig, ParallelConfig, from_mapping
from megatron_tn.device.matrix_rate import matmul_tflops
from megatron_tn.model.registry import parameter_count
from megatron_tn.parallel.world import release_on_leaving
from tests.helpers import hub
from tests.helpers.sizes import compose_model
from tests.helpers.training import SMALL, call

PROVENANCE = {"commit", "dirty", "command", "date", "gpu", "cpu", "torch", "triton", "deepspeed", "python"}


def test_rows_of_a_small_model(tmp_path):
    output = tmp_path / "rows.jsonl"
    settings = ("engine=local", "engine.precision=fp32", "data.micro_batch=2", "cluster.bf16_tflops=2.0")
    measured = ("benchmark.steps=2", "benchmark.loop_steps=12", f"benchmark.output={output}")
    assert call(main, *SMALL, *settings, *measured, "schedule=constant", f"run_dir={tmp_path}/run") == 0
    step, updated, loop = found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["name"] for row in found] == ["step", "step + optimizer", "training loop"]
    assert 0 < step["value"] < updated["value"]
    for row in found:
        assert row.keys() >= PROVENANCE | {"model", "engine", "layout", "sequence_length", "micro_batch"}
        assert not any(isinstance(value, dict | list) for value in row.values())
        assert (row["unit"], row["tokens"], row["gpus"]) == ("ms", 128, 1)
        assert row["tokens_per_second"] == pytest.approx(128e3 / row["value"])
        tflops = 6 * row["parameters"] * row["tokens_per_second"] / 1e12
        assert row["utilisation_sampled"] == pytest.approx(tflops / row["sampled_tflops"])
        assert row["utilisation_datasheet"] == pytest.approx(tflops / 2.0)
    journal = [json.loads(line) for line in (tmp_path / "run/loop/log.jsonl").read_text().splitlines()]
    later = [record["tokens_per_second"] for record in journal if "tokens_per_second" in record][10:]
    assert len(later) == 2
    assert min(later) <= loop["tokens_per_second"] <= max(later)


def test_one_process_of_srun_writes_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_tn.benchmark.measure", lambda config: [mock.Mock(row=lambda: {"name": "step"})])
    monkeypatch.setattr("megatron_tn.benchmark.show", lambda results: None)
    output = tmp_path / "rows.jsonl"
    for rank in ("1", "0"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert call(main, *SMALL, "engine=local", "engine.precision=fp32", f"benchmark.output={output}") == 0
        assert output.exists() == (rank == "0")


def test_one_rank_s_slice_beside_the_plan(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    words = ("model.layers=7", "parallel.tp=2", "parallel.sequence_parallel=true", "engine.precision=fp32")
    assert call(block.main, *SMALL, *words, "cluster=h200_141g", "benchmark.steps=1", f"benchmark.output={output}") == 0
    found = {row["name"]: row for row in map(json.loads, output.read_text().splitlines())}
    one, rest, whole = (found[f"slice: {name}"]["value"] for name in ("block", block.REST, "all layers"))
    assert whole == pytest.approx(rest + 7 * one)
    assert found["slice: all layers + predicted collectives"]["value"] > whole
    assert found["slice: block"]["layout"] == "tp 2, cp 1, dp 1, sequence parallel"


def test_collectives_of_a_world_of_copies():
    graphs = mock.Mock()
    with world_of_copies(ParallelConfig(tp=4)) as context:
        for count in (3, 4):  # 12 bytes, 16 bytes; NaN and Inf
            x, whole = torch.arange(count) / 0.0, torch.empty(4 * count)
            torch.distributed.all_gather_into_tensor(whole, x, group=context.tp.group)
            assert whole.view(torch.int32).equal(x.repeat(4).view(torch.int32))
        part, x = torch.empty(3), torch.arange(3.0)
        torch.distributed.reduce_scatter_tensor(part, torch.arange(12.0), group=context.tp.group)
        assert part.equal(x)
        release_on_leaving(graphs)
    assert not torch.distributed.is_initialized()
    graphs.release.assert_called_once()  # else the next slice would be measured beside this one's memory


def test_the_peer_of_a_transformer_has_its_parameters():
    hub.transformers()
    config = from_mapping(ModelConfig, compose_model("transformer_demo"))
    peer = llama(config, torch.device("meta"))
    assert sum(parameter.numel() for parameter in peer.parameters()) == parameter_count(config)
    assert peer.config.rope_parameters["rope_theta"] == config.rope_base


def test_a_retnet_has_our_parameters_but_for_the_weights_of_norms():
    pytest.importorskip("fla", reason="flash-linear-attention is not installed (pip install -e '.[bench]')")
    config = from_mapping(ModelConfig, compose_model("1b"))
    found = sum(parameter.numel() for parameter in retnet(config, torch.device("meta")).parameters())
    assert 0 < found - parameter_count(config) < 1e-4 * found


def test_a_peer_decodes_beside_us(tmp_path, monkeypatch, capsys):
    """A cache that does not fit leaves a row without a value."""
    hub.transformers()
    output = tmp_path / "rows.jsonl"
    words = ["--model", "transformer_demo", "--tokens", "2", "--output", str(output)]
    monkeypatch.setattr(decode, "RUNS", 1)
    decode.main([*words, "--peer", "llama", "--rows", "2", "--positions", "15"])
    monkeypatch.setattr(decode, "peer_token_ms", mock_out_of_memory)
    decode.main([*words, "--peer", "llama", "--rows", "64", "--positions", "17"])
    decode.main(words)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["name"], row["batch"], row["position"]) for row in found] == [
        ("decoding of a LLaMA", 2, 15),
        ("decoding of a LLaMA", 64, 17),
        ("decoding", 1, 0),
    ]
    assert [row["value"] is None for row in found] == [False, True, False]
    assert "after 17 tokens: the cache does not fit" in capsys.readouterr().out


def mock_out_of_memory(*_):
    raise torch.OutOfMemoryError


def test_a_row_begins_a_line(tmp_path):
    output = tmp_path / "rows.jsonl"
    for text in ("", '{"name": "edited"}', '{"name": "edited"}\n'):
        output.write_text(text)
        rows.append(output, [{"name": "one"}, {"name": "other"}])
        found = [json.loads(line)["name"] for line in output.read_text().splitlines()]
        assert found == ["edited"] * bool(text) + ["one", "other"]


def test_a_row_says_how_to_repeat_it():
    words = ["/usr/bin/python3", "-u", "-m", "megatron_tn.benchmark", "model=1b", "run_dir=my run"]
    assert rows.command(words, {}) == "python -m megatron_tn.benchmark model=1b 'run_dir=my run'"
    launched = rows.command(words, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert launched.startswith("torchrun --nproc-per-node 2 -m megatron_tn.benchmark model=1b")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_the_datasheet_rate_is_known_by_the_gpus_name(name, tflops):
    assert ClusterConfig().peak_tflops(name) == tflops
    assert ClusterConfig(bf16_tflops=100.0).peak_tflops(name) == 100.0


def test_checkpoints_of_a_small_model_are_timed_and_removed(tmp_path, capsys, monkeypatch):
    folder, output = tmp_path / "disk", tmp_path / "rows.jsonl"
    words = ["--folder", str(folder), "--models", "demo/2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["checkpoint", *words])
    checkpoint.main()
    found = {row["name"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert found.keys() >= {"dd, direct write", "pause, first save", "pause, later saves", "write", "load, cold"}
    parameters = parameter_count(from_mapping(ModelConfig, compose_model("demo")))
    for row in found.values():
        assert row["gigabytes"] == pytest.approx(12e-9 * parameters / 2, rel=0.01)
        assert row["value"] > 0
    assert found["write"]["of_dd"] == pytest.approx(found["write"]["value"] / found["dd, direct write"]["value"])
    assert not folder.exists()
    assert "verify, cold" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_matrix_rate_changes_no_generator(kind):
    device = torch.device(kind)
    generator = torch.cuda if kind == "cuda" else torch
    before = generator.get_rng_state()
    assert 1e-5 < matmul_tflops(device) < 1e4
    assert generator.get_rng_state().equal(before)
