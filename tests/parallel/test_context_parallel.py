"""Context and sequence parallelism: slices of any length, documents cut by them, and nothing that leaks."""

import dataclasses

import pytest
import torch

from kernels.gla import slice as slices
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.parallel.collectives import all_reduce_
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.state_passing import SequenceSlice
from tests.helpers.gradients import in_chunks
from tests.helpers.models import TINY, random_batch, reference_model, relative_errors
from tests.helpers.ranks import layout, run_shared, this_device

# Some slices lie within one document, some hold several, one bound falls on a slice's edge, two documents are empty.
LENGTH = 37
BOUNDS = [0, 3, 3, 18, 20, 33, LENGTH, LENGTH]
SLOW = dataclasses.replace(TINY, lrpe="all", decay="none")  # nothing fades: what leaks, shows


def on_ranks(context: ParallelContext, packed: bool, changed: bool = False, only_later: bool = False) -> dict:
    """Loss and whole gradients of one sequence in fp64, and the token losses by position; `changed`: document 2 is."""
    model = build_model(SLOW, context, "cpu", torch.float64)
    initialize(model, 0)
    tokens, targets = one_row(changed, only_later)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    out = model(tokens, targets=targets, cu_seqlens=bounds, reduction="sum")
    out.loss.backward()
    for parameter in model.parameters():
        all_reduce_(parameter.grad, context.cp)
    start = SequenceSlice(context.cp, LENGTH, None, torch.device("cpu")).start if context.cp.size > 1 else 0
    losses = all_reduce_(out.loss.detach().clone(), context.cp)
    return {
        "loss": losses,
        "gradients": model.named_logical_gradients(),
        "token_losses": {start + i: value for i, value in enumerate(out.token_losses[0].tolist())},
    }


def one_row(changed: bool = False, only_later: bool = False):
    tokens, targets = random_batch(1, LENGTH)
    if changed:
        within = slice(BOUNDS[2], BOUNDS[3])
        tokens = tokens.clone()
        tokens[:, within] = (tokens[:, within] + 7) % SLOW.vocab_size
    if only_later:
        targets = targets.clone()
        targets[:, : BOUNDS[3]] = -100
    return tokens, targets


def on_ranks_each_way(tp: int, cp: int) -> dict[str, list[dict]]:
    """Without and with sequence parallelism, where there is tensor parallelism, and with products cut into chunks: the
    sequence as one document, packed documents, and what must not leak between these."""
    contexts = [layout(tp, cp, shared) for shared in (False, True)[: min(tp, 2)]]
    leaks = [
        [on_ranks(context, True, changed, only_later) for only_later in (False, True) for changed in (False, True)]
        for context in contexts
    ]
    found = {False: [], True: []}
    for chunk_tokens in (None, 3)[: min(tp, 2)]:
        with in_chunks(chunk_tokens):
            for packed in found:
                found[packed] += [on_ranks(context, packed) for context in contexts]
    return {"one document": found[False], "packed": found[True], "leaks": leaks}


@pytest.mark.parametrize(("world", "tp", "cp"), [(2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 2, 2), (4, 4, 1)], ids=str)
def test_slices_equal_the_whole_sequence_and_documents_do_not_leak(world, tp, cp):
    ranks = run_shared(world, on_ranks_each_way, tp, cp)
    check_equal_to_one_process([rank["one document"] for rank in ranks], None)
    check_equal_to_one_process([rank["packed"] for rank in ranks], torch.tensor(BOUNDS, dtype=torch.int32))
    for rank in ranks:
        for leak in rank["leaks"]:
            check_that_nothing_leaks(*leak)


def check_equal_to_one_process(ranks: list[list[dict]], bounds: torch.Tensor | None) -> None:
    model = reference_model(SLOW, 0)
    tokens, targets = one_row()
    out = model(tokens, targets=targets, cu_seqlens=bounds, reduction="sum")
    out.loss.backward()
    wanted = model.named_logical_gradients()
    for each_rank in zip(*ranks, strict=True):
        seen = {}
        for found in each_rank:
            assert found["loss"].item() == pytest.approx(out.loss.item(), rel=1e-12)
            assert max(relative_errors(found["gradients"], wanted).values()) < 1e-11
            seen |= found["token_losses"]
        assert sorted(seen) == list(range(LENGTH))
        assert torch.allclose(torch.tensor([seen[i] for i in range(LENGTH)]), out.token_losses[0].detach().float())


def check_that_nothing_leaks(before: dict, after: dict, later_before: dict, later_after: dict) -> None:
    """By a change of document 2, which later documents' losses and gradients must not see: not by anything."""
    others = {*range(BOUNDS[2]), *range(BOUNDS[3], LENGTH)}
    for position in others & before["token_losses"].keys():
        assert before["token_losses"][position] == after["token_losses"][position]
    assert before["loss"] != after["loss"]
    for name, gradient in later_before["gradients"].items():
        assert torch.equal(gradient, later_after["gradients"][name]), name


def in_single_precision(cp: int) -> dict:
    """Token losses and whole gradients of packed documents, in fp32."""
    device = this_device()
    context = layout(1, cp)
    model = build_model(TINY, context, device, torch.float32)
    initialize(model, 0)
    tokens, targets = (part.to(device) for part in random_batch(1, 301))
    bounds = torch.tensor([0, 30, 30, 175, 200, 301, 301], dtype=torch.int32, device=device)
    out = model(tokens, targets=targets, cu_seqlens=bounds, reduction="sum")
    out.loss.backward()
    for parameter in model.parameters():
        all_reduce_(parameter.grad, context.cp)
    gradients = {name: gradient.cpu() for name, gradient in model.named_logical_gradients().items()}
    return {"token_losses": out.token_losses[0].cpu(), "gradients": gradients}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_slices_in_single_precision(device):
    whole = in_single_precision(1) if device == "cpu" else run_shared(1, in_single_precision, 1, device=device)[0]
    ranks = run_shared(2, in_single_precision, 2, device=device)
    losses = torch.cat([found["token_losses"] for found in ranks])
    torch.testing.assert_close(losses, whole["token_losses"], rtol=1e-5, atol=1e-5)
    for found in ranks:
        assert max(relative_errors(found["gradients"], whole["gradients"]).values()) < 2e-5


def states_kept() -> list[torch.Size]:
    """Shapes of what the forward pass of packed documents keeps, of those that are states' own."""
    shapes = []
    model = build_model(SLOW, layout(1, 2), "cpu", torch.float64)
    initialize(model, 0)
    tokens, targets = one_row()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        model(tokens, targets=targets, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    width = SLOW.embed_dim // SLOW.heads
    return [shape for shape in shapes if shape[1:] == (SLOW.heads, 2 * width, width)]


def test_of_many_documents_the_states_at_the_edges_are_kept():
    for shapes in run_shared(2, states_kept):
        assert len(shapes) == 2 * SLOW.layers  # the state before, and for theta's gradient the one after
        assert {shape[0] for shape in shapes} == {1}


def on_eight_ranks() -> dict:
    return on_ranks(layout(1, 8), packed=False)


@pytest.mark.full
def test_eight_ranks_agree():
    model = reference_model(SLOW, 0)
    tokens, targets = one_row()
    model(tokens, targets=targets, reduction="sum").loss.backward()
    wanted = model.named_logical_gradients()
    for found in run_shared(8, on_eight_ranks):
        assert max(relative_errors(found["gradients"], wanted).values()) < 1e-11


def test_states_from_other_ranks_keep_their_type_under_autocast():
    gathered, weights = torch.randn(6, 4, 8, 8), torch.rand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = slices._combine(gathered, weights)
    assert found.dtype == torch.float32
    assert torch.equal(found, slices._combine(gathered, weights))


def test_a_sequence_shorter_than_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"a sequence of 3 tokens cannot be cut into parallel\.cp=4 slices"):
        SequenceSlice(Axis(None, 0, 4), 3, None, torch.device("cpu"))
