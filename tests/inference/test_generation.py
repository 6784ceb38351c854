"""Decoding: what ends a continuation, and prompts that cannot be continued."""

import numpy as np
import pytest
import torch

from megatron_tn.inference import Prefix, Session
from megatron_tn.inference.generator import Generator, Request, generate, stream
from megatron_tn.inference.rows import batches_of, generate_rows
from megatron_tn.inference.sampler import Sampler
from tests.helpers.models import TINY, TRANSFORMER, reference_model


def test_decoding_equals_running_the_whole_text_each_time():
    model = reference_model(TINY, seed=1)
    prompt = [1, 5, 9]
    (found,) = generate(model, [prompt], max_new_tokens=12, sampler=Sampler(temperature=0))
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + len(found):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(prompt) :] == found


@pytest.mark.parametrize(
    ("config", "window"), [(TINY, 3), (TINY, 256), (TRANSFORMER, 3)], ids=["windows", "whole", "transformer"]
)
def test_prompts_of_different_lengths_decode_as_each_alone(config, window):
    model = reference_model(config, seed=1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 101, (length,), generator=draw).tolist() for length in (7, 1, 23, 8)]
    lengths = [5, 1, 9, 12]
    found = generate_rows(
        model,
        prompts,
        choose=lambda logits, positions: logits.argmax(-1),
        is_done=lambda row, ids: len(ids) == lengths[row],
        window=window,
    )
    for prompt, length, ids in zip(prompts, lengths, found, strict=True):
        assert [ids] == generate(model, [prompt], max_new_tokens=length, sampler=Sampler(temperature=0))


def test_batches_have_prompts_of_similar_length():
    assert list(batches_of([100, 3, 5, 70, 4], rows=3)) == [[1, 4, 2], [3, 0]]
    assert list(batches_of([1, 64, 66], rows=3)) == [[0, 1], [2]]
    assert list(batches_of([], rows=3)) == []


def test_it_stops_at_the_end_of_the_document():
    model = reference_model(TINY, seed=1)
    first = next(stream(model, [1], max_new_tokens=1, sampler=Sampler(temperature=0)))
    model.config = type(model.config)(**{**vars(model.config), "eos_id": first})
    assert generate(model, [[1]], max_new_tokens=5, sampler=Sampler(temperature=0)) == [[]]


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, "no tokens"),
        ([200], 1, "holds id 200"),
        ([1, 5.7], 1, r"a prompt is a list of ids, not \[1, 5.7\]"),
        ("abc", 1, "a prompt is a list of ids, not 'abc'"),
        (torch.tensor([[1, 5]]), 1, r"a prompt is a list of ids, not tensor\(\[\[1, 5"),
        (1, 1, "the prompt 1 is an id: give a list of prompts"),
        ([1], -1, "max_new_tokens=-1 must be at least 0, and whole"),
        ([1], 2.5, "max_new_tokens=2.5 must be at least 0, and whole"),
    ],
    ids=str,
)
def test_bad_requests(prompt, count, message):
    with pytest.raises(ValueError, match=message):
        generate(reference_model(TINY, 0), [prompt], max_new_tokens=count)


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": 1.5}, {"seed": 2**70}, {"number": -1}], ids=str)
def test_keys_of_random_numbers_that_are_none(given):
    with pytest.raises(ValueError, match=r"^(seed|number)=\S+ must be from 0 to 18446744073709551615, and whole$"):
        Request([1], **given)


def test_ids_may_be_a_tensor_or_an_array():
    model, ids = reference_model(TINY, 0), [1, 5, 9]
    wanted = generate(model, [ids] * 2, max_new_tokens=3)
    assert generate(model, [np.array(ids), torch.tensor(ids)], max_new_tokens=3) == wanted
    session = Session(model)
    session.feed(torch.tensor(ids))
    assert list(session.ask(max_new_tokens=3)) == wanted[0]


def test_an_open_ask_of_a_session(monkeypatch):
    model = reference_model(TINY, 0)
    (ids,) = generate(model, [[1, 5, 9]], max_new_tokens=6, sampler=Sampler(temperature=0))
    session = Session(model, Prefix.of(model, [1, 5, 9]))
    ask = session.ask(max_new_tokens=6, sampler=Sampler(temperature=0))
    assert [next(ask), next(ask)] == ids[:2]
    other = session.fork()
    assert (other.length, session.length) == (5, 5)
    assert list(other.ask(max_new_tokens=4, sampler=Sampler(temperature=0))) == ids[2:]
    for call, use in (("feed", lambda: session.feed([7])), ("ask", lambda: next(session.ask()))):
        with pytest.raises(RuntimeError, match=rf"^{call}\(\) while an ask\(\) of this session is open"):
            use()
    assert next(ask) == ids[2]
    with monkeypatch.context() as shutdown:
        shutdown.setattr(Prefix, "of", None)  # closing computes nothing
        ask.close()
    assert list(session.ask(max_new_tokens=3, sampler=Sampler(temperature=0))) == ids[3:]


def test_a_second_stream_of_a_generator_ends_the_first():
    generator = Generator(reference_model(TINY, 0), 2)
    one, two = (generator.stream([Request([1], max_new_tokens=4)]) for _ in range(2))
    assert next(one).ids
    assert next(two).ids
    with pytest.raises(RuntimeError, match="another stream of this Generator has begun"):
        next(one)
    assert sum(len(piece.ids) for piece in two) == 3
