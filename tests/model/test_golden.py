"""The model computes what the released one computes: logits, loss, every gradient, prefill and decoding, at any tp."""

import pytest
import torch
from torch import Tensor

from megatron_tn import ParallelContext, load_pretrained
from megatron_tn.model.base import Model
from megatron_tn.model.layout import TokenLayout
from tests.helpers.golden import NAMES, golden, relative_to_max
from tests.helpers.ranks import layout, run_shared

LOGITS, GRADIENT = 2e-5, 1e-4


def compute(name: str, context: ParallelContext | None = None) -> dict:
    """Everything the golden files hold, from a model of this layout; under sequence parallelism, which leaves tokens
    whole in decoding, without that."""
    wanted = golden(name)
    model = load_pretrained(wanted.directory, context)
    ids = wanted.io["input_ids"]
    loss = model.loss(ids, wanted.targets)
    loss.backward()
    found = {"loss": loss.detach(), "gradients": model.named_logical_gradients()}
    with torch.no_grad():
        found |= {"logits": model(ids).logits, "final_hidden": model.model(ids, TokenLayout.of(ids))[0]}
        return found if context is not None and context.sequence_parallel else found | decode(model, ids)


def decode(model: Model, ids: Tensor) -> dict[str, Tensor]:
    half = ids.shape[1] // 2
    out = model(ids[:, :half], return_state=True)
    decoded, state_after_prefill = [out.logits], out.state.layers[0]
    for at in range(half, ids.shape[1]):
        out = model(ids[:, at : at + 1], state=out.state, return_state=True)
        decoded.append(out.logits)
    return {"decode_logits": torch.cat(decoded, dim=1), "state": state_after_prefill}


def check(found: dict, name: str) -> None:
    wanted = golden(name)
    for key in {"logits", "decode_logits", "final_hidden"} & found.keys():
        assert relative_to_max(found[key], wanted.io[key]) < LOGITS, key
    torch.testing.assert_close(found["loss"], wanted.io["loss"][0], rtol=1e-6, atol=0)
    assert found["gradients"].keys() == wanted.gradients.keys()
    for parameter, gradient in wanted.gradients.items():
        error = (found["gradients"][parameter] - gradient).norm() / gradient.norm()
        assert error < GRADIENT, parameter


@pytest.mark.parametrize("name", NAMES)
def test_one_process(name):
    found = compute(name)
    check(found, name)
    wanted = golden(name).io["state_after_prefill_block_0"]
    assert relative_to_max(found["state"], wanted) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_hidden_state_after_the_first_block(name):
    wanted = golden(name)
    model = load_pretrained(wanted.directory)
    ids = wanted.io["input_ids"]
    with torch.no_grad():
        x = model.model.embed_tokens(ids)
        x, _ = model.blocks[0](x, TokenLayout.of(ids), model.model.decay(x.device)[0])
    assert relative_to_max(x, wanted.io["after_block_0"]) < LOGITS


def compute_each(tp: int, names: tuple[str, ...]) -> list[dict]:
    """Without and with sequence parallelism."""
    contexts = [layout(tp, sequence_parallel=shared) for shared in (False, True)]
    return [compute(name, context) for name in names for context in contexts]


@pytest.mark.parametrize(("tp", "names"), [(2, NAMES), (3, NAMES[1:]), (4, NAMES[:1])], ids=str)
def test_tensor_parallel(tp, names):
    for rank in run_shared(tp, compute_each, tp, names):
        for index, found in enumerate(rank):
            check(found, names[index // 2])
            assert ("decode_logits" in found) == (index % 2 == 0)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_the_logits_equal_those_through_the_loss(name):
    wanted = golden(name)
    model = load_pretrained(wanted.directory)
    logits = model(wanted.io["input_ids"]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.targets.flatten()).backward()
    for parameter, gradient in model.named_logical_gradients().items():
        assert (gradient - wanted.gradients[parameter]).norm() < GRADIENT * wanted.gradients[parameter].norm()
