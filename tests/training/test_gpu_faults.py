"""A CUDA error and an out-of-memory in one rank: the start ends and says why, and the next one goes on, bit for bit.

`python -m pytest -m gpu tests/training/test_gpu_faults.py`, on a machine with one GPU or two.
"""

import random
from pathlib import Path

import pytest
import torch

from launch.soak.__main__ import TRAINING
from launch.soak.faults import GPU_FAULTS
from launch.soak.soak import LocalTrainers, Soak
from megatron_tn.training.run_folder import RunFolder
from tests.helpers.shards import make_text_shards

pytestmark = pytest.mark.gpu
OWN = {
    "parallel.tp": 1,  # two GPUs: data parallel
    "data.micro_batch": 4,
    "model.vocab_size": 401,
    "checkpoint.every": 5,
    "evaluation.every": 0,
    "hang_timeout_s": 100,  # of the rank that does not fail and waits in NCCL
    "distributed_timeout_s": 300,  # kernels are compiled by the first start
}
SAID = ("CUDA error", "CUDA out of memory")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    shards = tmp_path_factory.mktemp("shards")
    make_text_shards(shards)
    kept = [word for word in TRAINING if word.partition("=")[0] not in OWN]
    return [*kept, *(f"{name}={value}" for name, value in OWN.items()), f"data.manifest={shards}/manifest.json"]


@pytest.mark.parametrize("gpus", [1, 2], ids="gpus={}".format)
def test_the_start_ends_and_the_next_goes_on(words, tmp_path, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    log, names = tmp_path / "log", iter(GPU_FAULTS)
    kinds = [next(names)]

    def start(folder: Path, more) -> LocalTrainers:
        return LocalTrainers(gpus, folder, [*words, *more], log)

    def say(line: str) -> None:
        print(line)
        kinds[0] = next(names, kinds[0])  # of the start after this fault's

    run = RunFolder(tmp_path / "run")
    soak = Soak(run, start, processes=gpus, mtbf_s=2.0, kinds=kinds, heal_s=0.0, choice=random.Random(0), say=say)
    soak.run(lambda: len(soak.events) == len(GPU_FAULTS))
    for fault in soak.events:
        print(f"{gpus} GPUs, {fault.fault}: ended with {fault.code} after {fault.took_s:.1f} s")
    assert soak.problems == [], log.read_text()
    assert [fault.fault for fault in soak.events] == list(GPU_FAULTS)
    assert [said for said in SAID if said not in log.read_text()] == []
    slow = OWN["hang_timeout_s"] / 2  # torchrun waits 30 s for the rank that is in NCCL
    assert [fault.fault for fault in soak.events if fault.took_s > slow] == []
    assert run.status()["state"] == "preempted"
    soak.compare(RunFolder(tmp_path / "undisturbed"))
    assert soak.problems == [], log.read_text()
