"""Sequence parallelism on its own: fewer tokens than ranks, what is kept, what is left whole, and what must fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.planning.live import saved_bytes
from tests.helpers.models import TINY, random_batch, reference_model, relative_errors
from tests.helpers.ranks import run_ranks

WEIGHTED = dataclasses.replace(TINY, norm="rmsnorm")
SIZES = [(1, 1), (1, 3), (2, 5), (3, 7), (4, 8)]  # rows and lengths; four ranks may have nothing but padding


def model_of(tp: int, shared: bool, dtype: torch.dtype = torch.float64):
    model = build_model(WEIGHTED, ParallelContext.create(tp, sequence_parallel=shared), "cpu", dtype)
    initialize(model, 0)
    return model


def gradients_of_each_size(tp: int) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    found = []
    for rows, length in SIZES:
        model = model_of(tp, shared=True)
        out = model(*random_batch(rows, length)[:1], targets=random_batch(rows, length, ignored=0)[1], reduction="sum")
        out.loss.backward()
        found.append((out.loss.detach(), model.named_logical_gradients()))
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_any_number_of_tokens_is_shared_out(tp):
    wanted = []
    for rows, length in SIZES:
        model = reference_model(WEIGHTED, 0)
        loss = model(
            *random_batch(rows, length)[:1], targets=random_batch(rows, length, ignored=0)[1], reduction="sum"
        ).loss
        loss.backward()
        wanted.append((loss.detach(), model.named_logical_gradients()))
    for found in run_ranks(tp, gradients_of_each_size, tp):
        for (loss, gradients), (true_loss, true_gradients) in zip(found, wanted, strict=True):
            assert loss.item() == pytest.approx(true_loss.item(), rel=1e-12)
            assert max(relative_errors(gradients, true_gradients).values()) < 1e-11


def without_a_reduction(tp: int) -> dict[str, torch.Tensor]:
    TokenSlices.repeated = lambda slices, parameter: parameter
    return gradients_of_each_size(tp)[-1][1]


def test_a_reduction_left_out_is_noticed():
    model = reference_model(WEIGHTED, 0)
    rows, length = SIZES[-1]
    model(
        *random_batch(rows, length)[:1], targets=random_batch(rows, length, ignored=0)[1], reduction="sum"
    ).loss.backward()
    for found in run_ranks(2, without_a_reduction, 2):
        errors = relative_errors(found, model.named_logical_gradients())
        wrong = {name for name, error in errors.items() if error > 1e-3}
        assert wrong == {name for name in errors if name.endswith("_norm.weight")}


def kept(tp: int) -> list[int]:
    """Bytes that the forward pass keeps, with whole tokens and with slices."""
    tokens, targets = random_batch(4, 32)
    sizes = []
    for shared in (False, True):
        model = model_of(tp, shared, torch.float32)
        outputs: list = []
        sizes.append(saved_bytes(lambda: outputs.append(model(tokens, targets=targets)), tuple(model.parameters())))  # noqa: B023
    return sizes


def test_less_is_kept_for_the_backward_pass():
    for whole, slices in run_ranks(4, kept, 4):
        assert slices < 0.6 * whole


def decoded(tp: int) -> list[torch.Tensor]:
    """Logits at once, and after a state, of a model that shares tokens out when it trains."""
    model = model_of(tp, shared=True)
    tokens, _ = random_batch(2, 6)
    with torch.no_grad():
        whole = model(tokens).logits
        out = model(tokens[:, :4], return_state=True)
        step = model(tokens[:, 4:5], state=out.state, return_state=True)
        last = model(tokens[:, 5:], state=step.state)
    return [whole, torch.cat([out.logits, step.logits, last.logits], dim=1)]


def test_decoding_leaves_tokens_whole():
    wanted = reference_model(WEIGHTED, 0)(random_batch(2, 6)[0]).logits
    for found in run_ranks(2, decoded, 2):
        for logits in found:
            torch.testing.assert_close(logits, wanted, rtol=1e-10, atol=1e-10)


def test_it_needs_tensor_parallelism():
    with pytest.raises(
        ValueError, match="sequence_parallel=True shares tokens out over tensor-parallel ranks, but tp=1"
    ):
        ParallelContext.create(1, sequence_parallel=True)
