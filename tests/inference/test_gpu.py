"""Decoding on a GPU: one CUDA graph a token gives what kernels launched one by one give."""

import dataclasses
import gc

import pytest
import torch

from megatron_tn.inference import Generator, Prefix, Request, Sampler, generate, keep_in_fp8
from megatron_tn.inference.decoder import Decoder
from megatron_tn.loading import load_any_model
from megatron_tn.model.base import Model
from megatron_tn.model.init import initialize
from megatron_tn.model.registry import build_model
from megatron_tn.released.write import save_pretrained
from tests.helpers.decoding import plain, prompts, recorded_logits, trained_model
from tests.helpers.models import TINY
from tests.helpers.ranks import layout, run_shared, this_device

pytestmark = pytest.mark.gpu
GREEDY = Sampler(temperature=0)
# Heads of 64: the widths of the step's kernel. Spread initial values: the next token depends on the prompt.
WIDE = dataclasses.replace(TINY, vocab_size=1000, embed_dim=256, heads=4, glu_dim=512, layers=2, init_std=0.1)


def model_on(device: str | torch.device, dtype: torch.dtype = torch.bfloat16, tp: int = 1) -> Model:
    model = build_model(WIDE, layout(tp), device, dtype)
    initialize(model, seed=0)
    return model


def requests() -> list[Request]:
    """More than rows, of different lengths and settings, so that rows are filled again under other plans."""
    samplers = [
        Sampler(1.0),
        Sampler(0.8, top_k=50),
        GREEDY,
        Sampler(1.0, top_p=0.9),
        Sampler(1.0, 9, 0.8, 1.2),
        GREEDY,
    ]
    return [
        Request(prompt, sampler=sampler, max_new_tokens=11 + 3 * n, seed=1, number=n)
        for n, (prompt, sampler) in enumerate(zip(prompts(), samplers, strict=True))
    ]


def decoded(model: Model, rows: int = 3) -> list[list[int]]:
    found = [[] for _ in requests()]
    for piece in Generator(model, rows).stream(requests()):
        found[piece.index] += piece.ids
    return found


@pytest.mark.parametrize("fp8_weights", [False, True], ids=["bf16", "fp8 weights"])
def test_a_graph_gives_what_kernels_one_by_one_give(monkeypatch, fp8_weights):
    """Bit for bit, since they are the same kernels; with refilled rows, plans that change, and looks 8 tokens apart."""
    model = model_on("cuda")
    if fp8_weights:
        keep_in_fp8(model)
    captured = decoded(model)
    assert sum(map(len, captured)) > 60
    monkeypatch.setattr(Decoder, "_run_one", Decoder._step)
    assert decoded(model) == captured


def test_states_and_logits_of_a_graph_are_those_of_the_recurrence():
    model = trained_model().cuda()
    ids, exact = plain(model, prompts()[3], 12)
    wanted = [plain(model, prompt, 12)[0] for prompt in prompts()]
    for feed_below in (0, 20):
        given = {"rows": 4, "feed_below": feed_below, "check_every": 5}
        assert generate(model, prompts(), max_new_tokens=12, sampler=GREEDY, **given) == wanted
    decoder, prefix = Decoder(model, 2), Prefix.of(model, prompts()[3], chunk=16)
    for row in range(2):
        decoder.start(row, prefix, sampler=GREEDY, key=0)
    with recorded_logits() as logits:
        found = decoder.run(12).read()
    assert found.T.tolist() == [ids] * 2
    assert len(logits) == 2  # one step ran kernel by kernel, one was captured
    assert (logits[0][1].cpu() - exact[0]).abs().max() < 1e-4 * exact.abs().max()
    whole = Prefix.of(model, prompts()[3] + ids)
    for buffer, layer in zip(decoder.states.layers, whole.state.layers, strict=True):
        torch.testing.assert_close(buffer[1], layer[0], rtol=1e-4, atol=1e-4)


def test_memory_does_not_grow_with_the_prompt():
    model, peaks = model_on("cuda"), []
    for chunks in (2, 2, 40):  # the first run compiles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        Prefix.of(model, [5] * (512 * chunks), chunk=512)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.01 * peaks[1]


def test_weights_are_converted_to_fp8_as_they_are_read(tmp_path):
    """The peak is what is kept and one matrix in bf16, with its temporaries: the whole in bf16 need not fit the GPU."""
    model = build_model(dataclasses.replace(WIDE, layers=24), None, "cuda", torch.bfloat16)
    initialize(model, seed=0)
    save_pretrained(model, tmp_path)
    largest = max(parameter.numel() for parameter in model.parameters())
    in_bf16 = sum(parameter.nbytes for parameter in model.parameters())
    del model
    gc.collect()  # layers with a common input refer to each other
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_any_model(str(tmp_path), "cuda", "bf16", fp8_weights=True)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    peak = torch.cuda.max_memory_allocated() - before
    print(f"bytes: {in_bf16} in bf16, {kept} kept, {peak} at the peak; the largest matrix has {largest} elements")
    assert peak < kept + 16 * largest < 0.7 * in_bf16


def on_ranks() -> list[list[int]]:
    return decoded(model_on(this_device(), torch.float32, tp=2))


@pytest.mark.gpu(2)
def test_tensor_parallel_ranks_capture_the_same_ids():
    one, other = run_shared(2, on_ranks, device="cuda")
    assert one == other
    alone = decoded(model_on("cuda", torch.float32))
    assert [ids[:4] for ids in one] == [ids[:4] for ids in alone]
