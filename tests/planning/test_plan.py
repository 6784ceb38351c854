"""`python -m megatron_tn.plan`: the layout it chooses, its JSON, exit code and warnings, and a sweep of layouts."""

import dataclasses
import json
import re

import pytest

from megatron_tn.cli.override_check import check_overrides
from megatron_tn.cli.overrides import CommandLine
from megatron_tn.config import CheckpointConfig, DataConfig, EngineConfig, ParallelConfig, PlanConfig
from megatron_tn.plan import main
from megatron_tn.planning.batch import with_usual_batch
from megatron_tn.planning.concerns import checkpoint_bytes, checkpoint_seconds, concerns
from megatron_tn.planning.estimate import plan_memory
from megatron_tn.planning.microbatch import extrapolated
from megatron_tn.planning.remedies import combinations
from megatron_tn.planning.report import make_plan
from megatron_tn.planning.speed import step_time
from tests.helpers.models import TINY, tiny_config
from tests.helpers.training import call
from tests.planning.test_speed import cluster

# Little memory, so that it decides between layouts of a small model.
SMALL = ("model=1b", "model.layers=4", "cluster=a100_80g", "cluster.gpu_memory_gib=10", "cluster.gpus_per_node=2")


def test_a_layout_is_chosen_where_none_is_named_and_the_same_words_give_it_again(capsys):
    assert call(main, *SMALL, "nodes=2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["processes"] == 4
    assert found["memory_bytes"]["all"] < found["memory_limit_bytes"]
    assert found["layout"] == found["search"][0]["layout"]
    assert not found["search"][0]["reason"]
    rates = [each["tokens_per_second_per_gpu"] for each in found["search"] if not each["reason"]]
    assert rates == sorted(rates, reverse=True)
    assert any(each["reason"].startswith("memory: ") for each in found["search"])
    assert {each["axis"] for each in found["traffic"]} == {"data"}
    assert any(": the tokens that GPT-3 of this size" in line for line in found["assumptions"])
    assert call(main, *SMALL, "nodes=2", *found["layout"].split(), "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert "search" not in again
    assert all(again[key] == found[key] for key in ("memory_bytes", "step_seconds", "traffic", "days"))


def test_a_search_keeps_what_is_named_and_says_why_not(capsys):
    words = ("parallel.tp=2", "engine=zero1", "data.micro_batch=4", "data.global_batch=64")
    assert call(main, *SMALL, *words, "search=true", "json=true") == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert all("parallel.tp=2" in each["layout"] and "engine=zero1" in each["layout"] for each in found)
    for shared in ("true", "false"):
        fitting = [each for each in found if f"sequence_parallel={shared}" in each["layout"] and not each["reason"]]
        assert fitting[0]["memory_bytes"] < 10 * 2**30
    assert call(main, *SMALL, "engine=zero1", "parallel.tp=1", "data.global_batch=3", "search=true") == 2
    assert "data.global_batch=3 is not a multiple" in capsys.readouterr().err
    assert call(main, *SMALL, "nodes=2", "data.global_batch=3") == 2  # 2 and 4 data-parallel ranks
    assert capsys.readouterr().err.startswith(
        "error: no division of nodes=2 x cluster.gpus_per_node=2 goes with the settings; with parallel.tp=2, "
        "parallel.cp=1: data.global_batch=3 is not a multiple of data.micro_batch=1 x data-parallel size 2 = 2"
    )
    assert call(main, *SMALL, "nodes=2", "parallel.cp=7") == 2
    assert "world size 4 (nodes=2 x cluster.gpus_per_node=2) is not a multiple" in capsys.readouterr().err


def test_what_fits_nowhere_has_the_leanest_layout_and_slices_alone_name_none(capsys):
    tiny = (*SMALL, "model.layers=2", "data.global_batch=32")
    assert call(main, *tiny, "cluster.gpu_memory_gib=2", "--json") == 2
    done = capsys.readouterr()
    found = json.loads(done.out)
    least = min(each["memory_bytes"] for each in found["search"] if each["memory_bytes"])
    assert found["memory_bytes"]["all"] == pytest.approx(least, rel=1e-3)
    assert "parallel.tp=2" in found["layout"]
    assert "take more nodes" in done.err
    engine = EngineConfig(name="deepspeed", zero_stage=1)
    offered = [words for words, _ in combinations(tiny_config(cluster=cluster("a100_80g"), engine=engine))]
    for sharded in ("zero3", "fsdp2"):
        least = f"parallel.sequence_parallel=true data.micro_batch=1 engine.recompute=full engine={sharded}"
        assert f"parallel.tp=8 {least}" in offered
    assert call(main, *tiny, "parallel.sequence_parallel=true", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all("parallel.tp=2 " in each["layout"] for each in found["search"] if not each["reason"])


def test_a_search_needs_to_know_the_cluster(capsys):
    assert call(main, "model=1b", "search=true") == 2
    assert "search=true needs cluster.gpu_memory_gib" in capsys.readouterr().err
    assert call(main, "model=demo", "data.global_batch=4") == 0  # memory alone
    out = " ".join(capsys.readouterr().out.split())
    assert "no time without cluster.bf16_tflops" in out
    assert "nothing says whether the layout fits" in out


@pytest.mark.parametrize(
    "wrong",
    [
        *("parallel.tp=0", "parallel.cp=-1", "data.micro_batch=0", "data.sequence_length=0", "nodes=0"),
        *("data.sequence_length=1000000000000", "data.micro_batch=4611686018427387904"),
        *("nodes=1000000000", "cluster.gpus_per_node=1000000000"),
        *(f"cluster.matrix_rates={rates}" for rates in ("[[512]]", "[[512,0]]", "[[1024,9],[512,9]]", "[[512,9,9]]")),
    ],
)
def test_what_no_layout_can_have_is_named(wrong, capsys):
    assert call(main, "model=demo", "cluster=a100_80g", "engine=zero1", wrong) == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err


def test_a_sweep_goes_past_layouts_that_do_not_fit_and_ends_with_a_table_or_json(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # into a pipe nothing is cut; readline, which pytest imports, sets it
    shared = (*SMALL, "model.layers=2", "data.global_batch=128", f"run_dir={tmp_path}")
    sweep = ("--multirun", *shared, "data.micro_batch=1,64,3")
    assert call(main, *sweep) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "data.micro_batch=" in line]
    fits, large, odd = (line.split("│")[1:-1] for line in rows)
    assert [cells[0].strip() for cells in (fits, large, odd)] == [f"data.micro_batch={rows}" for rows in (1, 64, 3)]
    assert not fits[-1].strip()
    assert re.search(r"a rank needs .* cluster.gpu_memory_gib=10.0; in GiB: data.micro_batch=\d+ needs \d", large[-1])
    assert odd[-1].rstrip().endswith("multiple of data.micro_batch=3 x data-parallel size 2 = 6")
    assert call(main, *sweep, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["fits"] for each in found] == [True, False, False]
    assert found[0]["overrides"][-1] == "data.micro_batch=1"
    assert found[0]["days"] > 0
    assert found[1]["problems"][0].startswith("a rank needs ")
    assert set(found[2]) == {"overrides", "fits", "problems"}
    assert call(main, *sweep, "nodes=512", "json=true") == 2  # 4096 processes have no batch of 128
    assert not any(each["fits"] for each in json.loads(capsys.readouterr().out))
    with_tokens_shared = ("parallel.sequence_parallel=true", "parallel.tp=1,2", "--json")
    assert call(main, *sweep[:-1], "data.micro_batch=1", *with_tokens_shared) == 0
    wrong, right = json.loads(capsys.readouterr().out)
    assert "parallel.tp=1: raise parallel.tp" in wrong["problems"][0]
    assert right["fits"]
    left_open = ("--multirun", "parallel.sequence_parallel=true,false", "run_dir=a")  # a search finds parallel.tp
    check_overrides(CommandLine.parse(PlanConfig, "plan", left_open))


def test_warnings_name_what_is_seldom_meant():
    base = tiny_config(
        cluster=cluster("a100_80g"),
        engine=EngineConfig(),
        data=DataConfig(sequence_length=2048, micro_batch=1, global_batch=256),
        nodes=2,
    )
    time = step_time(base, 16, extrapolated(base))
    slow = dataclasses.replace(time, products=60.0)
    assert list(concerns(base, slow, {})) == []
    wide = dataclasses.replace(base, parallel=ParallelConfig(tp=16))
    assert "parallel.tp=16 crosses nodes of cluster.gpus_per_node=8" in next(concerns(wide, slow, {}))
    for engine, said in (
        (EngineConfig(products="fp8"), "cluster.fp8_tflops"),
        (EngineConfig(precision="fp32"), "fp32"),
    ):
        (line,) = concerns(dataclasses.replace(base, engine=engine), slow, {})
        assert said in line
    split = dataclasses.replace(base, parallel=ParallelConfig(tp=2))
    (line,) = concerns(split, time, {})
    assert line.startswith("data.micro_batch=1 x data.sequence_length=2048, parallel.tp=2: a block takes the GPU 0.")
    assert list(concerns(split, dataclasses.replace(time, data_parallel=60.0), {})) == [line]  # once a step
    assert list(concerns(split, slow, {})) == []
    (line,) = concerns(base, slow, {"SLURM_JOB_NUM_NODES": "3"})
    assert line == "nodes=2, but this SLURM job has 3"
    by_hand = dataclasses.replace(base, nodes=1)  # the default: sbatch --nodes=3 launch/train.sbatch
    assert list(concerns(by_hand, slow, {"SLURM_JOB_NUM_NODES": "3", "WORLD_SIZE": "24"})) == []
    (line,) = concerns(by_hand, slow, {"SLURM_JOB_NUM_NODES": "3", "WORLD_SIZE": "12"})
    assert line == "nodes=3 x cluster.gpus_per_node=8 is not the world of 12 processes started"
    (line,) = concerns(base, slow, {"WORLD_SIZE": "8"})
    assert line == "nodes=2 x cluster.gpus_per_node=8 is not the world of 8 processes started"
    small = dataclasses.replace(base, data=dataclasses.replace(base.data, global_batch=16))
    assert "0.03 M tokens, far from 0.5 M" in next(concerns(small, slow, {}))
    many = with_usual_batch(base, 2**20)  # no batch of 0.5 M tokens has a sequence for each
    (line,) = make_plan(many, 2**20, 0, chosen=True).assumptions[-1:]
    assert line.startswith(f"data.global_batch={2**20}: one microbatch of each data-parallel rank")
    often = dataclasses.replace(base, checkpoint=CheckpointConfig(every=1))
    crawling = dataclasses.replace(often, cluster=dataclasses.replace(base.cluster, storage_gbs=1e-3))
    assert "checkpoint.every=1 steps take" in next(concerns(crawling, time, {}))
    assert checkpoint_seconds(crawling) == pytest.approx(checkpoint_bytes(base) / 2e6)


def test_extrapolated_memory_is_not_below_that_of_all_layers():
    model = dataclasses.replace(TINY, layers=5)
    config = tiny_config(model=model, parallel=ParallelConfig(tp=2, sequence_parallel=True))
    assert plan_memory(config, 2, extrapolated).total >= 0.999 * plan_memory(config, 2).total
