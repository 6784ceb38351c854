"""The same layouts on CUDA devices with NCCL: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from megatron_tn import load_pretrained
from megatron_tn.config import EngineConfig
from tests.engine.test_parity import LOCAL, RMSNORM, ZERO, check_gradients, name_of, train
from tests.engine.test_replicas import replicated
from tests.helpers.golden import NAMES, golden, relative_to_max
from tests.helpers.models import TINY
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.gpu
GPUS = torch.cuda.device_count()
LAYOUTS = [
    pytest.param(1, 1, marks=pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device"), id="1-gpu"),
    pytest.param(2, 1, marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices"), id="2-gpus-dp2"),
    pytest.param(2, 2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices"), id="2-gpus-tp2"),
]
BF16 = [EngineConfig(name="deepspeed", zero_stage=stage, precision="bf16") for stage in range(4)]


@pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors(name):
    wanted = golden(name)
    model = load_pretrained(wanted.directory, device="cuda")
    ids = wanted.io["input_ids"].cuda()
    assert relative_to_max(model(ids).logits.cpu(), wanted.io["logits"]) < 2e-5
    loss = model.loss(ids, wanted.targets.cuda())
    loss.backward()
    torch.testing.assert_close(loss.cpu(), wanted.io["loss"][0], rtol=1e-5, atol=0)
    for parameter, gradient in model.named_logical_gradients().items():
        error = (gradient.cpu() - wanted.gradients[parameter]).norm() / wanted.gradients[parameter].norm()
        assert error < 1e-4, parameter
    half, decoded = ids.shape[1] // 2, []
    with torch.no_grad():
        out = model(ids[:, :half], return_state=True)
        decoded.append(out.logits)
        for at in range(half, ids.shape[1]):
            out = model(ids[:, at : at + 1], state=out.state, return_state=True)
            decoded.append(out.logits)
    assert relative_to_max(torch.cat(decoded, dim=1).cpu(), wanted.io["decode_logits"]) < 2e-5


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
def test_gradients_equal_one_fp64_process(world, tp):
    cases = [(engine, n, TINY.norm) for engine in (LOCAL, *ZERO) for n in (1, 3)]
    check_gradients(world, tp, [*cases, (ZERO[1], 1, "rmsnorm"), (ZERO[3], 3, "rmsnorm")], device="cuda")


def train_each(tp: int, engines: list[EngineConfig]) -> dict[str, list[float]]:
    return {name_of(engine): train(tp, engine, 10, TINY)["losses"] for engine in engines}


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
def test_bf16_training_follows_fp32(world, tp):
    exact = run_ranks(1, train, 1, LOCAL, 10, TINY)[0]["losses"]
    for name, losses in run_ranks(world, train_each, tp, BF16, device="cuda")[0].items():
        assert losses == pytest.approx(exact, rel=0.02), name
        assert losses[-1] < losses[0] - 0.1, name


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_replicated_parameters_are_bit_equal_after_twenty_steps():
    one, other = (replicated(found) for found in run_ranks(2, train, 2, BF16[1], 20, RMSNORM, device="cuda"))
    for name in one:
        assert torch.equal(one[name], other[name]), name
