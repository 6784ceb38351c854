"""In bf16 a trained model, its export, the export in transformers, prefill by chunks and decoding token by token agree.

The bound is against the same bf16 weights in fp64, relative to the largest logit.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_tn import load_pretrained
from megatron_tn.inference import Generator, Prefix, Request, Sampler
from megatron_tn.inference.decoder import Decoder
from megatron_tn.model.base import Model
from megatron_tn.released.write import save_pretrained
from tests.helpers import hub
from tests.helpers.decoding import SHAPE, recorded_logits, sequences, train
from tests.helpers.golden import relative_to_max
from tests.helpers.models import reference_model

BOUND = 0.02
TOKENS = 120
# Heads of 128, as released: the widths of all kernels.
WIDE = dataclasses.replace(SHAPE, embed_dim=256, heads=2, glu_dim=704)


def exact_logits(model: Model, tokens: Tensor) -> Tensor:
    exact = reference_model(model.config, seed=0)
    exact.load_state_dict(model.state_dict())
    return exact(tokens.cpu()).logits


def by_chunks(model: Model, tokens: Tensor) -> Tensor:
    """Of the last token of each chunk."""
    found = []
    for end in range(16, TOKENS, 16):
        state = Prefix.of(model, tokens[0, :end].tolist(), chunk=16).state
        found.append(model(tokens[:, end - 1 : end], state=state, return_state=True).logits[:, 0])
    return torch.stack(found, dim=1)


def decoded(model: Model, tokens: Tensor, rows: int) -> Tensor:
    """By the decoder's steps, which take the tokens one by one: [1, T, V] of the last row."""
    generator = Generator(model, rows, together=rows, feed_below=TOKENS + 1)
    requests = [Request(tokens[0].tolist(), sampler=Sampler(temperature=0), max_new_tokens=1)] * rows
    with recorded_logits() as logits:
        list(generator.stream(requests))
    return torch.stack([each[-1] for each in logits[:TOKENS]])[None]


@pytest.mark.parametrize(
    ("device", "shape", "steps", "rate"),
    [
        pytest.param("cpu", SHAPE, 40, 1e-2, marks=pytest.mark.full),
        pytest.param("cuda", WIDE, 100, 3e-3, marks=pytest.mark.gpu),
    ],
    ids=["cpu", "gpu"],
)
@torch.no_grad()
def test_every_way_agrees(tmp_path, monkeypatch, device, shape, steps, rate):
    hub.transformers()
    monkeypatch.setattr(Decoder, "_run_one", Decoder._step)  # kernel by kernel, so that every step's logits are seen
    trained = reference_model(shape, seed=1, dtype=torch.float32).to(device)
    with torch.enable_grad():
        train(trained, steps, rate)
    trained = trained.bfloat16()
    save_pretrained(trained, tmp_path)
    exported = load_pretrained(tmp_path, device=device, dtype=torch.bfloat16)
    assert all(map(torch.equal, trained.parameters(), exported.parameters()))
    tokens = sequences(1, TOKENS, seed=7).to(device)
    exact = exact_logits(trained, tokens)
    whole = trained(tokens).logits
    assert torch.equal(exported(tokens).logits, whole)
    found = {"trained": whole, **hub.logits_by_path(tmp_path, tokens, torch.bfloat16)}
    found |= {f"decoder, {rows} rows": decoded(exported, tokens, rows) for rows in (1, 2, 16)}
    errors = {way: relative_to_max(logits.cpu().double(), exact) for way, logits in found.items()}
    chunked = by_chunks(exported, tokens).cpu().double()
    errors["chunks"] = relative_to_max(chunked, exact[:, 15 : TOKENS - 1 : 16])
    assert max(errors.values()) < BOUND, errors
    sure = exact.topk(2).values.diff().abs()[..., 0] > 2 * BOUND * exact.abs().max()
    assert sure.float().mean() > 0.5
    for way, logits in found.items():
        assert torch.equal(logits.cpu().argmax(-1)[sure], exact.argmax(-1)[sure]), way
