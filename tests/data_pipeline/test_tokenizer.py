"""Decoding gives back the text to the byte, and training twice gives the same file."""

import json
import random

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from data_pipeline import tokenizer as tokenizers
from data_pipeline.encoder import Encoder
from data_pipeline.errors import InputError

CORPUS = [
    f"def function_{n}(self, value):\n    if value > {n}:\n        return [value] * {n}\n\n    return None  # nothing\n"
    for n in range(300)
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizers.train(lambda: iter(CORPUS), 600).save(str(path))
    return path


# ruff: noqa: RUF001  (full-width punctuation is what is tested)
TEXTS = {
    "code": "class A:\n\tdef f(self):\n        return {'a': [1, 22, 333, 4444]}\n\n\n    # end\r\n",
    "spaces": "  two   three \t tab\n\n \n   \u00a0\u2003\u3000 wide \v\f\x1c end   ",
    "chinese": "机器学习是人工智能的一个分支。第二句，没有空格！",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \U0001f1e9\U0001f1ea",
    "scripts": "Ελληνικά עברית العربية हिन्दी ไทย 한국어 日本語",
    "special entries": "<s>hello</s><pad><unk><s>",
    "byte names": "<0x41><0x0A> <0xFF>",
    "controls": "".join(map(chr, range(32))) + "\x7f\x80\u200b\ufeff\ufffd\uffff",
    "empty": "",
    "space": " ",
    "newlines": "\n\n\n",
    "rulers": "=" * 500 + "\n" + " " * 500,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_round_trip(path, text):
    tokenizer = tokenizers.load(path)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)  # a text cannot spell the end of its document


def test_round_trip_of_any_character(path):
    tokenizer, generator = tokenizers.load(path), random.Random(0)
    alphabet = [c for c in map(chr, range(0x110000)) if not "\ud800" <= c <= "\udfff"]
    for _ in range(50):
        text = "".join(generator.choices(alphabet, k=1000)) + "".join(generator.choices(" \n\ta_1(é", k=200))
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_an_encoder_gives_the_ids_of_the_tokenizer(path):
    """Random texts of all that pieces begin and end with: in ASCII by looking pieces up, else by the tokenizer."""
    tokenizer, generator = tokenizers.load(path), random.Random(1)
    encoder = Encoder(tokenizer)
    ascii_texts = ["".join(generator.choices(" \n\t\r\v\f_aZ19.<=(\x00\x1c\x1f\x7f", k=400)) for _ in range(300)]
    for text in [*CORPUS, *TEXTS.values(), *ascii_texts, *(text + "é" for text in ascii_texts[:20])]:
        assert encoder.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.known
    assert encoder.encode("").dtype == np.uint32


def test_an_encoder_leaves_other_tokenizers_to_themselves(path):
    """One that looks for entries of its own in a text, or cuts it otherwise."""
    other, third = tokenizers.load(path), tokenizers.load(path)
    other.add_tokens(["valuevalue"])
    third.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer in (other, third):
        encoder, text = Encoder(tokenizer), "a valuevalue  b"
        assert encoder.known is None
        assert encoder.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_every_byte_has_an_id(path):
    tokenizer = tokenizers.load(path)
    assert [tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)] == list(range(4, 260))
    assert tokenizer.encode("Ω", add_special_tokens=False).ids == [4 + byte for byte in "Ω".encode()]


def test_a_line_end_and_its_indentation_are_one_token(path):
    tokens = tokenizers.load(path).encode("value:\n        return value\n\n    return", add_special_tokens=False).tokens
    assert "\n        " in tokens
    assert "\n\n    " in tokens


def test_training_depends_on_the_texts_alone(path):
    again = tokenizers.train(lambda: reversed(CORPUS), 600)
    assert again.to_str(pretty=True) == path.read_text()


def test_description_matches_the_file(path):
    info = tokenizers.describe(path)
    assert (info.pad, info.bos, info.eos) == (0, 1, 2)
    assert info.vocab_size == 600
    assert len(info.sha256) == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: tokenizers.train(lambda: iter(CORPUS), 300), "vocab_size=300"),
        (lambda path: tokenizers.load(path.with_name("absent.json")), "absent.json"),
        (lambda path: tokenizers.describe(path, bos="[BOS]"), r"tokenizer.bos='\[BOS\]'"),
        (
            lambda path: tokenizers.describe(path, eos="e"),
            r"tokenizer.eos='e': a text that spells it would have its id",
        ),
    ],
    ids=["too small", "absent", "no such entry", "an entry of texts"],
)
def test_refused_by_name(path, call, message):
    with pytest.raises(InputError, match=message):
        call(path)


def test_a_vocabulary_with_numbers_left_out_holds_its_largest_id(path, tmp_path):
    record = json.loads(path.read_text())
    vocabulary = record["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 100
    (tmp_path / "gap.json").write_text(json.dumps(record))
    assert tokenizers.describe(tmp_path / "gap.json").vocab_size == vocabulary[last] + 1


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad\.json"):
        tokenizers.load(tmp_path / "bad.json")


def test_a_character_seen_in_training_only_as_noise_still_round_trips():
    tokenizer = tokenizers.train(lambda: iter(["a b c 中" * 3, "<0x41>" * 50]), 400)
    tokenizer.encode_special_tokens = True
    for text in ("中", "<0x41>", "A"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
