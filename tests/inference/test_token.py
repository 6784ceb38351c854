"""The fused forward pass of a decoding step against the model's own."""

import copy

import pytest
import torch

from kernels.gla.step_buffer import StepBuffer
from megatron_tn.inference import states as inference_states
from megatron_tn.inference.states import BufferedRowStates, RowStates
from megatron_tn.inference.token import token_logits
from megatron_tn.model import decoding
from megatron_tn.model.base import DecodingState
from megatron_tn.parallel.fp8_weights import keep_in_fp8
from tests.helpers.models import TINY, reference_model
from tests.kernels.support import relative_error

VARIANTS = {
    "released": {},
    "lrpe everywhere": {"lrpe": "all", "scale_embedding": False},
    "no gate, swiglu": {"gate": False, "glu_act": "silu", "act": "1+elu", "lrpe": "none"},
}


def compare(model, device: str, dtype: torch.dtype, bound: float, *, fp8_weights: bool = False) -> None:
    model = model.to(device, dtype)
    if fp8_weights:
        keep_in_fp8(model)
    generator = torch.Generator().manual_seed(0)
    fused = model.model.initial_state(1)
    plain = model.model.initial_state(1)
    positions = torch.tensor([70_000], device=device)
    for _ in range(4):
        tokens = torch.randint(0, model.config.vocab_size, (1,), generator=generator).to(device)
        with torch.no_grad():
            got = decoding.token_logits(model, tokens, positions, fused)
            wanted = model(tokens[:, None], state=DecodingState(plain, positions), update_state=True).logits[:, 0]
        assert relative_error(got, wanted) <= bound
        assert max(map(relative_error, fused, plain)) <= bound
        positions = positions + 1


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_computes_the_models_function(changes):
    model = reference_model(type(TINY)(**{**vars(TINY), **changes}), seed=1)
    assert decoding.serves(model, 1)
    assert not decoding.serves(model, 2)
    compare(model, "cpu", torch.float64, 1e-10)
    compare(model, "cpu", torch.float64, 1e-10, fp8_weights=True)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_computes_the_models_function_on_the_gpu(changes):
    model = reference_model(type(TINY)(**{**vars(TINY), **changes}), seed=1)
    compare(model, "cuda", torch.float32, 1e-5)
    compare(model, "cuda", torch.float32, 1e-5, fp8_weights=True)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_in_bf16_it_is_as_near_to_fp64_as_the_models_own_pass(changes):
    model = reference_model(type(TINY)(**{**vars(TINY), **changes}), seed=1).to("cuda", torch.bfloat16)
    exact_model = copy.deepcopy(model).to("cpu", torch.float64)
    states = [m.model.initial_state(1) for m in (model, model, exact_model)]
    errors = torch.zeros(2)
    for position in range(70_000, 70_008):
        tokens, positions = torch.tensor([position % 50]), torch.tensor([position])
        with torch.no_grad():
            fused = decoding.token_logits(model, tokens.cuda(), positions.cuda(), states[0])
            plain, exact = (
                m(t[:, None], state=DecodingState(s, p), update_state=True).logits[:, 0]
                for m, t, p, s in (
                    (model, tokens.cuda(), positions.cuda(), states[1]),
                    (exact_model, tokens, positions, states[2]),
                )
            )
        errors += torch.tensor([relative_error(x, exact) for x in (fused, plain)])
    assert errors[0] <= 1.1 * errors[1]


def test_other_models_take_their_own_forward_pass():
    model = reference_model(type(TINY)(**{**vars(TINY), "norm": "rmsnorm"}), seed=1)
    assert not decoding.serves(model, 1)
    tokens, positions = torch.tensor([1, 2]), torch.tensor([0, 0])
    with torch.no_grad():
        got = token_logits(model, tokens, positions, model.model.initial_state(2))
        assert relative_error(got, model(tokens[:, None]).logits[:, 0]) < 1e-6


def row_of(states: RowStates, row: int) -> list[torch.Tensor]:
    """Copies of the states of `row`, B = 1."""
    layers = states.layers
    if isinstance(states, BufferedRowStates):
        layers = map(StepBuffer.folded, states.buffers, states.model.model.decay("cpu"))
    return [layer[row : row + 1].clone() for layer in layers]


def test_buffered_states_give_the_greedy_tokens_of_plain_ones(monkeypatch):
    """Rows that begin at different times, over several folds, and a state taken out between two of them."""
    model = reference_model(TINY, seed=1)

    def run(make):
        states = make(model, 3)
        tokens, positions = torch.tensor([1, 2, 3]), torch.tensor([0, 4, 9])
        found = []
        with torch.no_grad():
            for step in range(11):
                if step == 6:
                    states.put(1, DecodingState(row_of(states, 2), 0))
                logits = states.logits(tokens, positions)
                states.advance()
                tokens, positions = logits.argmax(-1), positions + 1
                found.append(logits)
        return torch.stack(found), row_of(states, 1)

    monkeypatch.setattr(inference_states, "SLOTS", 4)
    (buffered, buffered_state), (plain, plain_state) = run(BufferedRowStates), run(RowStates)
    assert torch.equal(buffered.argmax(-1), plain.argmax(-1))
    assert relative_error(buffered, plain) < 1e-5
    assert max(map(relative_error, buffered_state, plain_state)) < 1e-5
