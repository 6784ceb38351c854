"""Text of ids as they come: split characters, stop strings across token borders, and files of prompts."""

import io
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_tn.inference.records import OrderedLines, prompt_problems, read_prompts, whole_lines
from megatron_tn.inference.text import TextStream


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request) -> Tokenizer:
    """A token for each byte; the second as in LLaMA's tokenizer, where a run of bytes is text or none of it is."""
    if request.param == "byte_level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
        tokenizer = Tokenizer(models.BPE(vocabulary | {"a": 256}, [], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def run(tokenizer: Tokenizer, text: str, stop=(), context=()) -> tuple[list[str], bool, str]:
    """(what each id made final, whether it stopped, all of the text)."""
    stream = TextStream(tokenizer, context, stop)
    pieces, stopped = [], False
    for chosen in tokenizer.encode(text).ids:
        stopped = stream(chosen)
        pieces.append(stream.take())
        if stopped:
            break
    stream.finish()
    pieces.append(stream.take())
    assert "".join(pieces) == stream.text
    return pieces, stopped, stream.text


def test_characters_of_several_tokens(tokenizer):
    pieces, stopped, text = run(tokenizer, "aé世🙂b", context=tokenizer.encode("xé").ids)
    assert pieces == ["a", "", "é", "", "", "世", "", "", "", "🙂", "b", ""]
    assert (stopped, text) == (False, "aé世🙂b")


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    stream = TextStream(tokenizer)
    stream(tokenizer.encode("a").ids[0])
    for chosen in tokenizer.encode("世").ids[:2]:
        assert not stream(chosen)
    stream.finish()
    assert stream.text.startswith("a\ufffd")
    for _ in range(100):  # bytes that never become a character are shown after a while
        stream(tokenizer.encode("世").ids[1])
    assert len(stream.text) > 50


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "stopped"),
    [
        ("one. two. three", [". t"], "one", True),
        ("one. Two. three", [". th", "o. t"], "one. Tw", True),
        ("ababac", ["abac"], "ab", True),
        ("a世界b", ["世界"], "a", True),
        ("a🙂", ["🙂!", "🙁"], "a🙂", False),
        ("ends in on", ["one"], "ends in on", False),
        ("nothing", [""], "nothing", False),
    ],
)
def test_stop_strings(tokenizer, text, stop, wanted, stopped):
    pieces, found, said = run(tokenizer, text, stop)
    assert (said, found) == (wanted, stopped)
    if stopped:
        assert "".join(pieces[:-1]) == wanted  # and not a character of the stop string before


def test_lines_are_written_in_order_as_soon_as_they_can_be():
    file = io.BytesIO()
    lines = OrderedLines(file, first=2)
    lines.put(3, {"text": "世"})
    assert file.getvalue() == b""
    lines.put(2, {"text": "\ud800"})
    assert file.getvalue().splitlines() == [b'{"text": "\\ud800"}', '{"text": "世"}'.encode()]


def test_prompts_that_cannot_be_read_are_named_by_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['{"text": "a"}', "", "{", "[1]", '{"other": 1}', '{"text": 3}', '{"text": "a", "end": 1}', "{", "{"]
    path.write_text("\n".join(lines))
    found = [line.removeprefix(f"prompts={path}, line ") for line in prompt_problems(str(path), "text", {"end"})]
    assert found[0].startswith("3: no JSON: ")
    assert found[1:] == [
        "4: a JSON list, no object",
        "5: text_key=text: no such key; there are other",
        "6: text_key=text: 3 is no text",
        "7: the key 'end' is there already: output_key names another",
    ]
    path.write_text(json.dumps({"text": "\ud83d"}))
    assert "holds half a character" in prompt_problems(str(path), "text", set())[0]
    path.write_text('{"text": "a", "id": 1}\n\n{"text": "b"}')
    assert [record["text"] for record in read_prompts(str(path))] == ["a", "b"]
    assert whole_lines(str(path)) == (2, len('{"text": "a", "id": 1}\n\n'))
    path.write_text(" \n\n")
    assert prompt_problems(str(path), "text", set()) == [f"prompts={path} has no texts"]
    assert prompt_problems("/dev/null", "text", set()) == [
        "prompts=/dev/null is no regular file, and is read more than once"
    ]
    assert prompt_problems(str(tmp_path), "text", set()) == [f"prompts={tmp_path} cannot be read: Is a directory"]
