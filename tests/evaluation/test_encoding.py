"""Contexts and continuations: whole, once, and with bos before them."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.tokenizer import train
from megatron_tn.evaluation.encoding import encode_pair
from megatron_tn.loading import read_tokenizer

BOS = 1
TEXT = "the cat sat on the mat. Question: does naïve 数字 count 1234 birds?\n\tAnswer: yes, 🐈 = (12)\n"


def ours() -> Tokenizer:
    found = train(lambda: [TEXT * 20], 500)
    found.encode_special_tokens = True
    return found


def byte_level() -> Tokenizer:
    """As GPT-2's, whose offsets leave white space out; it lower-cases and adds a bos of its own."""
    found = Tokenizer(models.BPE())
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator([TEXT * 20], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    own = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    found.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), own])
    return found


@pytest.mark.parametrize("make", [ours, byte_level])
def test_no_letter_is_lost_wherever_a_text_is_cut(make, tmp_path):
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer, draw = read_tokenizer(tmp_path / "tokenizer.json"), random.Random(0)
    crossed = 0
    for _ in range(400):
        begin, end = sorted(draw.sample(range(len(TEXT) + 1), 2))
        text = TEXT[begin:end]
        border = draw.randint(0, len(text))
        context, continuation = text[:border], text[border:]
        ids, first = encode_pair(tokenizer, BOS, context, continuation)
        assert ids.tolist() == [BOS, *tokenizer.encode(text, add_special_tokens=False).ids]
        lowered = text.lower() if make is byte_level else text
        assert tokenizer.decode(ids[1:].tolist()) == lowered
        scored = tokenizer.decode(ids[first:].tolist())
        assert scored.endswith(lowered[border:])
        if first < len(ids):  # the first scored token has a letter of the continuation, or white space before it
            given = tokenizer.decode(ids[1 : first + 1].tolist())
            assert len(given) > len(context.rstrip())
        crossed += len(scored) > len(continuation) + len(context) - len(context.rstrip())
    assert crossed > 20


def test_a_merge_across_the_border_is_scored():
    tokenizer = ours()
    ids, first = encode_pair(tokenizer, BOS, "the c", "at sat")
    assert tokenizer.decode(ids[first:].tolist()) == " cat sat"
    ids, first = encode_pair(tokenizer, BOS, "the ", "cat")  # the space is the word's
    assert tokenizer.decode(ids[first:].tolist()) == " cat"
    assert [BOS, *tokenizer.encode("the cat", add_special_tokens=False).ids] == ids.tolist()


def test_bos_is_given_once_and_never_scored():
    tokenizer = ours()
    for context, continuation, letters in (("", "the cat", "the cat"), ("<s>", "a", "a"), ("", "", ""), ("a", "", "")):
        ids, first = encode_pair(tokenizer, BOS, context, continuation)
        assert ids.tolist().count(BOS) == 1
        assert ids[0] == BOS
        assert first >= 1
        assert tokenizer.decode(ids[first:].tolist()) == letters
