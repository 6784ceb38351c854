"""Every way to decode gives the greedy ids of the plain recurrence on a trained model, and its logits within 1e-5."""

import copy
import dataclasses
import gc
import itertools
from pathlib import Path

import pytest
import torch

from megatron_tn import load_pretrained
from megatron_tn.config import ConfigError
from megatron_tn.inference import Generator, Prefix, Request, Sampler, Session, generate, keep_in_fp8
from megatron_tn.inference.prefix import fingerprint
from megatron_tn.inference.prefix_file import load_prefix, save_prefix
from megatron_tn.model.base import Model
from megatron_tn.released.write import save_pretrained
from tests.helpers.decoding import plain, prompts, recorded_logits, trained_model
from tests.helpers.models import COSFORMER, HYBRID, TRANSFORMER, TRANSNORMER_2022, reference_model
from tests.helpers.ranks import layout, run_shared

COUNT = 9
GREEDY = Sampler(temperature=0)
LOGITS_ERROR = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_pretrained(trained_model(), folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load_pretrained(folder)


@pytest.fixture(scope="module")
def wanted(model) -> list[list[int]]:
    return [plain(model, prompt, COUNT)[0] for prompt in prompts()]


def test_the_model_decodes_no_constant(wanted):
    assert all(len(set(ids)) > COUNT // 2 for ids in wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 1},
        {"rows": 4},
        {"rows": 4, "together": 4, "check_every": 4},
        {"rows": 6, "together": 3, "chunk": 3},
        {"rows": 4, "together": 2, "check_every": 3, "feed_below": 20},
    ],
    ids=["alone", "four at a time", "together", "by chunks", "fed"],
)
def test_batches_refilled_in_every_way(model, wanted, options):
    assert generate(model, prompts(), max_new_tokens=COUNT, sampler=GREEDY, **options) == wanted


@pytest.mark.parametrize("chunk", [4, 4096])
def test_logits(model, chunk):
    for prompt in prompts()[1:4]:
        ids, exact = plain(model, prompt, COUNT)
        with recorded_logits() as found:
            assert generate(model, [prompt], max_new_tokens=COUNT, sampler=GREEDY, chunk=chunk) == [ids]
        assert torch.cat(found).shape == exact.shape
        assert (torch.cat(found) - exact).abs().max() < LOGITS_ERROR * exact.abs().max()


def ways_of_a_prefix(model: Model, path: str) -> dict[str, list[list[int]]]:
    """The continuations of every prompt, forked at a third of it; saved there and loaded; and fed to a session."""
    found = {"forked": [], "loaded": [], "session": []}
    generator = Generator(model, 2)
    for prompt in prompts():
        cut = len(prompt) // 3 + 1
        begun = Prefix.of(model, prompt[:cut], chunk=7)
        save_prefix(begun, model, path)
        for way, prefix in (("forked", begun), ("loaded", load_prefix(path, model))):
            twice = [Request(prompt[cut:], prefix, GREEDY, COUNT)] * 2
            ids = [[], []]
            for piece in generator.stream(twice):
                ids[piece.index] += piece.ids
            assert ids[0] == ids[1]
            found[way].append(ids[0])
        session = Session(model)
        session.feed(prompt)
        other = session.fork()
        begun, asked = list(other.ask(max_new_tokens=2, sampler=GREEDY)), session.ask(max_new_tokens=4, sampler=GREEDY)
        taken = list(itertools.islice(asked, 3))
        asked.close()
        assert (session.length, other.length) == (len(prompt) + 3, len(prompt) + 2)
        assert begun == taken[:2]
        found["session"].append(taken + list(session.ask(max_new_tokens=COUNT - 3, sampler=GREEDY)))
    return found


def test_forked_saved_and_fed(model, wanted, tmp_path):
    assert ways_of_a_prefix(model, f"{tmp_path}/prefix") == dict.fromkeys(("forked", "loaded", "session"), wanted)


def on_ranks(folder: Path, path: Path) -> tuple:
    """Greedy and sampled continuations, the ways of a prefix, one of another layout, and one with fp8 weights. A prefix
    of a model that one rank has no longer is refused on both."""
    model, equal = load_pretrained(folder, layout(tp=2)), load_pretrained(folder, layout(tp=2))
    before = Prefix.of(equal, [1, 2, 3])
    held = [equal] * model.context.tp.rank
    del equal
    gc.collect()
    with pytest.raises(ValueError, match="its weights are no longer in memory"):
        Prefix.of(model, [1], before)
    held.clear()
    given = {"max_new_tokens": COUNT, "rows": 4, "chunk": 5}
    other = Session.load(model, path)
    kept = load_pretrained(folder, layout(tp=2), fp8_weights=True)
    return (
        generate(model, prompts(), sampler=GREEDY, **given),
        generate(model, prompts(), sampler=Sampler(1.0, top_k=20, top_p=0.9), seed=3, **given),
        ways_of_a_prefix(model, f"{path}.tp2"),
        list(other.ask(max_new_tokens=COUNT, sampler=GREEDY)),
        (generate(kept, prompts(), sampler=GREEDY, **given), fingerprint(kept)),
    )


def test_tensor_parallel_ranks_say_the_same_as_one(model, wanted, folder, tmp_path):
    path = tmp_path / "prefix"
    save_prefix(Prefix.of(model, prompts()[3]), model, path)
    sampled = generate(model, prompts(), sampler=Sampler(1.0, top_k=20, top_p=0.9), max_new_tokens=COUNT, seed=3)
    ways = dict.fromkeys(("forked", "loaded", "session"), wanted)
    kept = load_pretrained(folder)
    keep_in_fp8(kept)
    in_fp8 = generate(kept, prompts(), sampler=GREEDY, max_new_tokens=COUNT), fingerprint(kept)
    assert run_shared(2, on_ranks, folder, path) == [(wanted, sampled, ways, wanted[3], in_fp8)] * 2
    last = Session.load(model, f"{path}.tp2")  # of the last prompt's beginning, written by two ranks
    last.feed(prompts()[-1][last.length :])
    assert list(last.ask(max_new_tokens=COUNT, sampler=GREEDY)) == wanted[-1]


OTHERS = {config.name: config for config in (TRANSFORMER, HYBRID, COSFORMER, TRANSNORMER_2022)}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_architectures_and_their_states(config, tmp_path):
    """In fp64, against the whole text each time; a state may grow with every token, or hold what is left of a block."""
    model = reference_model(dataclasses.replace(config, init_std=0.2), seed=2)
    given = {"max_new_tokens": COUNT, "sampler": GREEDY, "rows": 3}
    short = [prompt[:14] for prompt in prompts()]
    found = generate(model, short, **given)
    assert generate(model, short, **given, together=2, chunk=5) == found
    for prompt, continuation in zip(short, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == continuation
        session = Session(model)
        session.feed(prompt)
        session.save(tmp_path / "prefix")
        assert list(Session.load(model, tmp_path / "prefix").ask(max_new_tokens=COUNT, sampler=GREEDY)) == continuation
    state = session.prefix.state
    wrong = [state._replace(layers=[layer[..., :-1, :, :] for layer in state.layers])]
    if config is not COSFORMER:  # some layer's state says how many tokens it has
        wrong.append(state._replace(position=state.position + 1))
    for each in wrong:
        save_prefix(dataclasses.replace(session.prefix, state=each), model, tmp_path / "prefix")
        with pytest.raises(ConfigError, match=r"is damaged: layer\.\d is torch\.float64 \[.*\], not torch\.float64 \["):
            Session.load(model, tmp_path / "prefix")


MIXED = [
    Sampler(1.0),
    Sampler(0.7, top_k=5),
    Sampler(1.3, top_p=0.8),
    GREEDY,
    Sampler(1.0, top_k=30, top_p=0.9, repetition_penalty=1.3),
    Sampler(0.0, repetition_penalty=1.5),
]


def test_a_sampled_text_does_not_depend_on_its_company(model):
    """On a CPU: batch size, order and neighbours, each with settings of its own."""
    requests = [
        Request(prompt, sampler=sampler, max_new_tokens=COUNT, seed=5, number=number)
        for number, (prompt, sampler) in enumerate(zip(prompts(), MIXED, strict=True))
    ]

    def texts(order: list[int], rows: int) -> dict[int, list[int]]:
        found = {number: [] for number in order}
        for piece in Generator(model, rows).stream(requests[number] for number in order):
            found[order[piece.index]] += piece.ids
        return found

    alone = {number: texts([number], 1)[number] for number in range(len(requests))}
    assert texts([0, 1, 2, 3, 4, 5], 4) == alone
    assert texts([5, 2, 4, 1], 8) == {number: alone[number] for number in (5, 2, 4, 1)}
    again = [Request(requests[0].prompt, sampler=MIXED[0], max_new_tokens=COUNT, seed=5, number=n) for n in range(3)]
    pieces = (piece for request in again for piece in Generator(model, 1, check_every=COUNT).stream([request]))
    assert len({tuple(piece.ids) for piece in pieces}) == 3


def test_a_state_of_another_model_is_refused_by_name(model, tmp_path):
    path = tmp_path / "prefix"
    session = Session(model)
    with pytest.raises(ValueError, match="the session has no tokens"):
        session.save(path)
    session.feed([1, 2, 3])
    session.save(path)
    changed, equal = trained_model(steps=1), copy.deepcopy(model)
    assert list(Session(equal, session.prefix).ask(max_new_tokens=2, sampler=GREEDY))
    with pytest.raises(ValueError, match="was computed by another model: weights with fingerprint"):
        Session(changed, session.prefix).feed([1])
    gone = Prefix.of(equal, [1, 2, 3])
    del equal
    gc.collect()
    with pytest.raises(ValueError, match="was computed by another model: its weights are no longer in memory"):
        Prefix.of(model, [1], gone)
    with pytest.raises(Exception, match="was computed by another model: weights with fingerprint"):
        Session.load(changed, path)
    with pytest.raises(Exception, match=r"another model: weights in torch\.float32, not torch\.float64"):
        Session.load(changed.double(), path)
    changed.config = type(changed.config)(**{**vars(changed.config), "act": "none"})
    with pytest.raises(Exception, match="another model: act: 'silu' -> 'none'"):
        Session.load(changed, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Exception, match=f"state={path} cannot be read"):
        Session.load(model, path)
