"""Sequence parallelism on its own: fewer tokens than ranks, what is kept, what is left whole, and what must fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_tn.model.base import Model
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sequence import TokenSlices
from tests.helpers.models import TINY, random_batch, reference_model, relative_errors
from tests.helpers.ranks import layout, run_shared
from tests.helpers.saved import saved_bytes

WEIGHTED = dataclasses.replace(TINY, norm="rmsnorm")
SIZES = [(1, 1), (1, 3), (2, 5), (3, 7), (4, 8)]  # rows and lengths; four ranks may have nothing but padding


@pytest.fixture(scope="module", params=[2, 4], ids="tp{}".format)
def ranks(request) -> list[Found]:
    return run_shared(request.param, on_ranks, request.param)


@pytest.fixture(scope="module")
def wanted() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of each of SIZES in one process."""
    return gradients_of_each_size(lambda: reference_model(WEIGHTED, 0))


class Found(NamedTuple):
    """What a rank computes. gradients: loss and whole gradients of each of SIZES; without_a_reduction: gradients of the
    last where norm weights' are not summed; kept: bytes kept for the backward pass by (whole tokens, slices)."""

    gradients: list[tuple[Tensor, dict[str, Tensor]]]
    without_a_reduction: dict[str, Tensor]
    kept: tuple[int, int]
    logits: list[Tensor]


def on_ranks(tp: int) -> Found:
    whole, shared = (layout(tp, sequence_parallel=shared) for shared in (False, True))
    gradients = gradients_of_each_size(lambda: model_of(shared))
    kept = saved_by(model_of(whole, torch.float32)), saved_by(model_of(shared, torch.float32))
    logits = decoded(model_of(shared))
    with mock.patch.object(TokenSlices, "repeated", lambda slices, parameter: parameter):
        ((_, without_a_reduction),) = gradients_of_each_size(lambda: model_of(shared), SIZES[-1:])
    return Found(gradients, without_a_reduction, kept, logits)


def model_of(context: ParallelContext, dtype: torch.dtype = torch.float64) -> Model:
    model = build_model(WEIGHTED, context, "cpu", dtype)
    initialize(model, 0)
    return model


def gradients_of_each_size(model_of: Callable[[], Model], sizes=SIZES) -> list[tuple[Tensor, dict[str, Tensor]]]:
    found = []
    for rows, length in sizes:
        model = model_of()
        tokens, targets = random_batch(rows, length, ignored=0)
        loss = model(tokens, targets=targets, reduction="sum").loss
        loss.backward()
        found.append((loss.detach(), model.named_logical_gradients()))
    return found


def saved_by(model: Model) -> int:
    tokens, targets = random_batch(4, 32)
    outputs: list = []
    return saved_bytes(lambda: outputs.append(model(tokens, targets=targets)), tuple(model.parameters()))


def decoded(model: Model) -> list[Tensor]:
    """Logits at once, and after a state, of a model that shares tokens out when it trains."""
    tokens, _ = random_batch(2, 6)
    with torch.no_grad():
        whole = model(tokens).logits
        out = model(tokens[:, :4], return_state=True)
        step = model(tokens[:, 4:5], state=out.state, return_state=True)
        last = model(tokens[:, 5:], state=step.state)
    return [whole, torch.cat([out.logits, step.logits, last.logits], dim=1)]


def test_any_number_of_tokens_is_shared_out(ranks, wanted):
    for rank in ranks:
        for (loss, gradients), (true_loss, true_gradients) in zip(rank.gradients, wanted, strict=True):
            assert loss.item() == pytest.approx(true_loss.item(), rel=1e-12)
            assert max(relative_errors(gradients, true_gradients).values()) < 1e-11


def test_a_reduction_left_out_is_noticed(ranks, wanted):
    for rank in ranks:
        errors = relative_errors(rank.without_a_reduction, wanted[-1][1])
        wrong = {name for name, error in errors.items() if error > 1e-3}
        assert wrong == {name for name in errors if name.endswith("_norm.weight")}


def test_less_is_kept_for_the_backward_pass(ranks):
    for rank in ranks:
        whole, slices = rank.kept
        assert slices < (0.6 if len(ranks) == 4 else 0.8) * whole


def test_decoding_leaves_tokens_whole(ranks):
    wanted = reference_model(WEIGHTED, 0)(random_batch(2, 6)[0]).logits
    for rank in ranks:
        for logits in rank.logits:
            torch.testing.assert_close(logits, wanted, rtol=1e-10, atol=1e-10)


def test_it_needs_tensor_parallelism():
    with pytest.raises(
        ValueError, match="sequence_parallel=True shares tokens out over tensor-parallel ranks, but tp=1"
    ):
        ParallelContext.create(1, sequence_parallel=True)
