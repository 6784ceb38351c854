"""The model as a whole: sizes, packed documents, carried state, variants, and input it refuses."""

import dataclasses

import pytest
import torch

from megatron_tn.config import ConfigError, ModelConfig, from_mapping
from megatron_tn.model.layout import document_positions
from megatron_tn.model.registry import build_model
from tests.helpers.models import TINY, TRANSFORMER, random_batch, reference_model
from tests.helpers.sizes import SIZES, compose_model


@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_released_one(name):
    config = from_mapping(ModelConfig, compose_model(name))
    size = SIZES[name]
    shape = (config.layers, config.embed_dim, config.heads, config.glu_dim, not config.scale_embedding)
    assert shape == size.shape
    assert config.head_dim == 128
    model = build_model(config, None, "meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(size.parameters, rel=size.tolerance)


def pack(lengths: list[int], room: int) -> torch.Tensor:
    """Boundaries of documents laid end to end, padded to a fixed length by repeating the end."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(room - len(ends))]).int()


LENGTHS = [5, 1, 17, 9]


ARCHITECTURES = pytest.mark.parametrize(
    "config", [dataclasses.replace(TINY, lrpe="all"), TRANSFORMER], ids=["transnormer", "transformer"]
)


@ARCHITECTURES
def test_packed_documents_equal_each_alone(config):
    model = reference_model(config, seed=1)
    tokens, targets = random_batch(1, sum(LENGTHS))
    packed = model(tokens, cu_seqlens=pack(LENGTHS, 8)).logits
    alone = torch.cat([model(part).logits for part in tokens.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-11, atol=1e-12)

    gradients = []
    for parts in ([slice(0, sum(LENGTHS))], None):
        model.zero_grad()
        if parts:
            model(tokens, targets=targets, cu_seqlens=pack(LENGTHS, 8), reduction="sum").loss.backward()
        else:
            for ids, wanted in zip(tokens.split(LENGTHS, 1), targets.split(LENGTHS, 1), strict=True):
                model(ids, targets=wanted, reduction="sum").loss.backward()
        gradients.append(model.named_logical_gradients())
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-9, atol=1e-11, msg=name)


# decay="none" is the hardest case: nothing would fade on its own.
@pytest.mark.parametrize("config", [dataclasses.replace(TINY, decay="none"), TRANSFORMER], ids=lambda c: c.name)
def test_a_document_does_not_see_its_neighbours_at_all(config):
    model = reference_model(config, seed=1, dtype=torch.float32)
    tokens, _ = random_batch(1, sum(LENGTHS))
    boundaries = pack(LENGTHS, 5)
    before = model(tokens, cu_seqlens=boundaries).logits
    changed = tokens.clone()
    changed[0, 6:23] = (changed[0, 6:23] + 1) % TINY.vocab_size  # the third document
    after = model(changed, cu_seqlens=boundaries).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert torch.equal(before[:, 23:], after[:, 23:])
    assert not torch.equal(before[:, 6:23], after[:, 6:23])


def test_positions_start_again_at_each_document():
    found = document_positions(10, torch.tensor([0, 3, 4, 10, 10], dtype=torch.int32), torch.device("cpu"))
    assert found.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("cuts", [[1, 1, 30], [13, 19], [31, 1]])
@ARCHITECTURES
def test_state_carries_everything(config, cuts):
    model = reference_model(config, seed=2)
    tokens, _ = random_batch(2, sum(cuts))
    whole, state, parts = model(tokens).logits, None, []
    for piece in tokens.split(cuts, dim=1):
        out = model(piece, state=state, return_state=True)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-9)  # the state itself is fp32
    assert state.position == sum(cuts)


VARIANTS = [
    {"act": "none"},
    {"act": "1+elu"},
    {"glu_act": "silu"},
    {"gate": False},
    {"lrpe": "none"},
    {"lrpe": "all"},
    {"lrpe": [False, True]},
    {"decay": "paper"},
    {"decay": "none"},
    {"decay_temperature": False},
    {"scale_embedding": False},
]


@pytest.mark.parametrize("change", VARIANTS, ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()))
def test_every_ablation_changes_the_function_and_trains(change):
    tokens, targets = random_batch(2, 20)
    plain = reference_model(TINY, seed=3)
    model = reference_model(dataclasses.replace(TINY, **change), seed=3)
    assert not torch.allclose(plain(tokens).logits, model(tokens).logits, rtol=1e-6)
    loss = model.loss(tokens, targets)
    loss.backward()
    step = torch.optim.SGD(model.parameters(), lr=0.05)
    step.step()
    assert model.loss(tokens, targets) < loss


def test_rmsnorm_starts_as_simplermsnorm_and_learns_its_weights():
    tokens, targets = random_batch(2, 20)
    model = reference_model(dataclasses.replace(TINY, norm="rmsnorm"), seed=3)
    torch.testing.assert_close(model(tokens).logits, reference_model(TINY, seed=3)(tokens).logits)
    model.loss(tokens, targets).backward()
    weights = {name: p.grad for name, p in model.named_parameters() if name.endswith("norm.weight")}
    assert len(weights) == 3 * TINY.layers + 1  # before each mixer, over the heads, and at the end
    assert all(gradient.abs().max() > 0 for gradient in weights.values())


def test_gate_takes_part_only_when_it_is_on():
    model = reference_model(dataclasses.replace(TINY, gate=False), seed=3)
    tokens, targets = random_batch(2, 20)
    model.loss(tokens, targets).backward()
    q, k, v, u = model.model.layers[0].token_mixer.qkvu_proj.weight.grad.chunk(4)
    assert u.abs().max() == 0 < min(part.abs().max() for part in (q, k, v))


def test_reductions_agree():
    model = reference_model(TINY, seed=4)
    tokens, targets = random_batch(3, 11)
    mean = model(tokens, targets=targets).loss
    total = model(tokens, targets=targets, reduction="sum").loss
    each = model(tokens, targets=targets, reduction="none").loss
    counted = targets != -100
    assert each.shape == tokens.shape
    assert (each[~counted] == 0).all()
    torch.testing.assert_close(total, mean * counted.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(each.sum(), total.detach(), rtol=1e-6, atol=0, check_dtype=False)


def test_a_batch_without_targets_has_zero_loss():
    model = reference_model(TINY, seed=4)
    tokens, targets = random_batch(1, 5)
    assert model.loss(tokens, torch.full_like(targets, -100)).item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "avg"}, "reduction='avg' is not one of"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "shape \\[1, N\\], got \\[2, 3\\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model = reference_model(TINY, seed=0)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 3, dtype=torch.int64), **arguments)


def test_sizes_that_do_not_divide_are_all_named():
    with pytest.raises(ConfigError) as caught:
        build_model(dataclasses.replace(TINY, embed_dim=65, lrpe=[True]))
    assert "model.embed_dim=65 is not divisible by model.heads=8" in caught.value.problems
    assert "model.lrpe has 1 entries but model.layers=2" in caught.value.problems
