"""The fused forward pass of a decoding step against the model's own."""

import pytest
import torch

from megatron_tn.inference.token import token_logits
from megatron_tn.model import decoding
from megatron_tn.model.base import DecodingState
from tests.helpers.models import TINY, reference_model
from tests.kernels.support import relative_error

VARIANTS = {
    "released": {},
    "lrpe everywhere": {"lrpe": "all", "scale_embedding": False},
    "no gate, swiglu": {"gate": False, "glu_act": "silu", "act": "1+elu", "lrpe": "none"},
}


def compare(model, device: str, dtype: torch.dtype, bound: float) -> None:
    model = model.to(device, dtype)
    rows = 3
    generator = torch.Generator().manual_seed(0)
    fused = model.model.initial_state(rows)
    plain = model.model.initial_state(rows)
    positions = torch.tensor([0, 5, 70_000], device=device)
    for _ in range(4):
        tokens = torch.randint(0, model.config.vocab_size, (rows,), generator=generator).to(device)
        with torch.no_grad():
            got = decoding.token_logits(model, tokens, positions, fused)
            wanted = model(tokens[:, None], state=DecodingState(plain, positions), update_state=True).logits[:, 0]
        assert relative_error(got, wanted) <= bound
        assert max(map(relative_error, fused, plain)) <= bound
        positions = positions + 1


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_computes_the_models_function(changes):
    model = reference_model(type(TINY)(**{**vars(TINY), **changes}), seed=1)
    assert decoding.serves(model, 3)
    assert not decoding.serves(model, 17)
    compare(model, "cpu", torch.float64, 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_computes_the_models_function_on_the_gpu(changes):
    model = reference_model(type(TINY)(**{**vars(TINY), **changes}), seed=1)
    compare(model, "cuda", torch.float32, 1e-5)
    compare(model, "cuda", torch.bfloat16, 2e-2)


def test_other_models_take_their_own_forward_pass():
    model = reference_model(type(TINY)(**{**vars(TINY), "norm": "rmsnorm"}), seed=1)
    assert not decoding.serves(model, 2)
    tokens, positions = torch.tensor([1, 2]), torch.tensor([0, 0])
    with torch.no_grad():
        got = token_logits(model, tokens, positions, model.model.initial_state(2))
        assert relative_error(got, model(tokens[:, None]).logits[:, 0]) < 1e-6
