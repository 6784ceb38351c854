"""`python -m megatron_tn.generate`: files of prompts, states of prefixes, tensor parallel ranks, what it refuses."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_tn.generate import main as generate
from megatron_tn.inference.records import open_output, output_problems
from megatron_tn.released.write import save_pretrained
from tests.helpers.models import TINY, reference_model
from tests.helpers.training import call, fork_ranks

TEXTS = ["The cat", "", "naïve 世界", "x = [", "a longer prompt than the others, by far"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A released folder whose tokenizer has a token for each byte, behind three special ones."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = dataclasses.replace(TINY, vocab_size=259, layers=2, init_std=0.2)
    save_pretrained(reference_model(shape, seed=1, dtype=torch.float32), folder)
    vocabulary = {letter: 3 + index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<pad>": 0, "<s>": 1, "</s>": 2}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def words(checkpoint: Path, *more: str) -> tuple[str, ...]:
    return (f"checkpoint={checkpoint}", "device=cpu", "max_new_tokens=12", *more)


def continued(checkpoint: Path, prompts: Path, output: Path, *more: str) -> bytes:
    assert call(generate, *words(checkpoint, f"prompts={prompts}", f"output={output}", *more)) == 0
    return output.read_bytes()


def test_a_file_is_continued_in_order_at_any_batch_and_from_where_it_broke_off(checkpoint, prompts, tmp_path, capsys):
    settings = ("samples=2", "temperature=1.0", "top_k=40", "top_p=0.95", "repetition_penalty=1.1", "seed=4", "stop=e")
    found = continued(checkpoint, prompts, tmp_path / "one", *settings, "batch=1")
    records = [json.loads(line) for line in found.splitlines()]
    assert [(record["id"], record["text"], record["sample"]) for record in records] == [
        (n, text, sample) for n, text in enumerate(TEXTS) for sample in range(2)
    ]
    assert len({record["continuation"] for record in records}) == len(records)
    assert {record["end"] for record in records} <= {"stop", "length", "eos"}
    assert not any("e" in record["continuation"] for record in records)
    assert continued(checkpoint, prompts, tmp_path / "four", *settings, "batch=4", "prefill_chunk=3") == found
    again = tmp_path / "four"
    again.write_bytes(found[: len(found) // 2])
    assert call(generate, *words(checkpoint, f"prompts={prompts}", f"output={again}", *settings)) == 2
    assert f"output={again} exists: resume=true goes on" in capsys.readouterr().err
    assert continued(checkpoint, prompts, again, *settings, "resume=true") == found
    assert call(generate, *words(checkpoint, f"prompts={prompts}", f"output={again}", "resume=true")) == 2
    assert f"output={again}, line 1: sample is 0, not missing: resume=true cannot" in capsys.readouterr().err
    with open_output(str(again)):
        assert (
            call(generate, *words(checkpoint, f"prompts={prompts}", f"output={again}", *settings, "resume=true")) == 2
        )
    assert capsys.readouterr().err == f"error: output={again} is being written by another process\n"
    assert again.read_bytes() == found
    for length in (1, 9, 40, found.index(b"\n")):  # it broke off in its first line
        again.write_bytes(found[:length])
        capsys.readouterr()
        assert call(generate, f"prompts={prompts}", f"output={again}", "resume=true") == 2
        assert capsys.readouterr().err.startswith("error: checkpoint is not set")  # and nothing of output


def test_a_prompt_is_printed_with_the_continuation_that_a_file_has(checkpoint, tmp_path, capsys):
    given = ("temperature=1.0", "seed=2", 'stop=["zz", "\\n"]', "prompt= é [x=1]")
    assert call(generate, *words(checkpoint, *given)) == 0
    said = capsys.readouterr().out
    assert call(generate, *words(checkpoint, *given, f"output={tmp_path / 'out'}")) == 0
    record = json.loads((tmp_path / "out").read_text())
    assert record["text"] == " é [x=1]"
    assert said == record["text"] + record["continuation"] + "\n"
    assert call(generate, *words(checkpoint, *given, "samples=3")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2]
    assert lines[0]["continuation"] == record["continuation"]


def test_a_state_is_continued_as_its_text_is(checkpoint, prompts, tmp_path, capsys):
    state, wanted, found = tmp_path / "prefix.safetensors", tmp_path / "wanted", tmp_path / "found"
    assert call(generate, *words(checkpoint, "prompt=Once upon ", f"save_state={state}", "max_new_tokens=0")) == 0
    assert capsys.readouterr().out == "Once upon \n"
    records = [json.loads(line) for line in continued(checkpoint, prompts, found, f"state={state}").splitlines()]
    whole = [record | {"text": "Once upon " + record["text"]} for record in map(json.loads, prompts.open())]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in whole))
    same = [json.loads(line) for line in continued(checkpoint, prompts, wanted).splitlines()]
    assert [record["continuation"] for record in records] == [record["continuation"] for record in same]
    assert call(generate, *words(checkpoint, "prompt=Twice", f"save_state={state}", "max_new_tokens=0")) == 0
    other = tmp_path / "other"
    save_pretrained(
        reference_model(dataclasses.replace(TINY, vocab_size=259, layers=3), seed=2, dtype=torch.float32), other
    )
    (other / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    assert call(generate, *words(other, f"state={state}")) == 2
    assert f"state={state} was computed by another model: layers: 2 -> 3" in capsys.readouterr().err
    assert call(generate, *words(other, f"save_state={state}")) == 2
    assert f"save_state={state} cannot be written: the state of another model is there" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(state)
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("other/tokenizer.json", "a file is there"), ("link", "it is no"), ("pipe", "it is no")):
        assert call(generate, *words(checkpoint, f"save_state={tmp_path / name}")) == 2
        assert f"save_state={tmp_path / name} cannot be written: {why}" in capsys.readouterr().err
    assert (other / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert call(generate, *words(checkpoint, f"state={state}", "fp8_weights=true")) == 2
    assert "another model: weights in torch.float32, not torch.float32 and fp8" in capsys.readouterr().err


def on_a_rank(lines: tuple[str, ...]) -> None:
    sys.exit(call(generate, *lines))


def test_tensor_parallel_ranks_write_what_one_process_writes(checkpoint, prompts, tmp_path):
    wanted = continued(checkpoint, prompts, tmp_path / "one", "temperature=1.0")
    lines = words(checkpoint, f"prompts={prompts}", f"output={tmp_path / 'two'}", "temperature=1.0")
    ranks = fork_ranks(2, on_a_rank, lines)
    for rank in ranks:
        rank.join(timeout=300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert (tmp_path / "two").read_bytes() == wanted


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["batch=1000000000000", "samples=1000000000000"],
            "batch=1000000000000, together=0: the states of so",
        ),
        (["together=1000000000000"], "batch=8, together=1000000000000: the states of so many texts need "),
        (["max_new_tokens=99999999999999999", "check_every=99999999999999999"], "batch=8, together=0, prefill_chunk="),
    ],
    ids=["batch", "together", "check_every"],
)
def test_what_does_not_fit_into_memory_is_a_line(checkpoint, capsys, words, line):
    assert call(generate, f"checkpoint={checkpoint}", "prompt=a", "device=cpu", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_everything_that_is_wrong_is_said_at_the_start(checkpoint, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    prompts.write_text('{"text": 1}\n')
    given = (
        f"prompts={prompts}",
        "prompt=both",
        f"state={tmp_path}/none",
        f"save_state={tmp_path}",
        "output=/nowhere/x",
        'stop=["a", 1]',
        "output_key=end",
        "top_k=-1",
        "repetition_penalty=0",
        "batch=0",
        "device=cuda:1",
    )
    assert call(generate, f"checkpoint={checkpoint}", *given) == 2
    said = capsys.readouterr().err
    for problem in (
        f"prompts={prompts}, line 1: text_key=text: 1 is no text",
        f"prompt=both is for one text, and prompts={prompts} for many",
        f"save_state={tmp_path} is for one text",
        f"save_state={tmp_path} is a folder",
        f"state={tmp_path}/none cannot be read: there is no such file",
        "output=/nowhere/x cannot be written",
        'stop=["a", 1] must be a list of texts',
        "output_key=end must be none of",
        "top_k=-1 must be",
        "repetition_penalty=0.0 must be above 0",
        "batch=0 must be",
        "device=cuda:1: each of 2 processes takes its own",
    ):
        assert f"error: {problem}" in said
    monkeypatch.delenv("WORLD_SIZE")
    assert call(generate, f"checkpoint={checkpoint}", "device=cpu", 'stop=["a"') == 2
    assert 'stop=["a" begins a JSON list, and is none' in capsys.readouterr().err
    prompts.write_text('{"text": "a"}\r\n{"text": "b"}')
    given = (f"prompts={prompts}", f"output={prompts}", "resume=true", "stop=\udcff")
    assert call(generate, f"checkpoint={checkpoint}", *given) == 2
    said = capsys.readouterr().err
    assert f"error: output={prompts} is prompts={prompts} itself" in said
    assert r"error: stop='\udcff' is no text: it has bytes that are not UTF-8" in said
    whole = '{"id": 1, "text": "a", "continuation": "b", "end": "eos", "sample": 0}\n'
    for content, why in (
        ('{"mine": 1}', "line 1: it does not begin as the line of its text"),
        ('{"continuation": "a"}', "line 1: it does not begin as the line of its text"),
        ("mine\n", "line 1: no JSON: "),
        ('{"mine": 1}\n', "line 1: it has no continuation: "),
        ("[1]\n", "line 1: a JSON list, no object"),
        ("1\n", "line 1: a JSON int, no object"),
        (whole + "mine\n", "line 2: no JSON: "),
        (whole + "mine", "line 2: it does not begin as the line of its text"),
        (whole.replace('"eos"', "7"), "line 1: it has no end: "),
        (whole.replace('"id": 1', '"id": 2'), "line 1: id is 2, not 1: "),
        (whole.replace('"a"', '"c"'), 'line 1: text is "c", not "a": '),
        (whole.replace(', "sample": 0', ""), "line 1: sample is missing, not 0: "),
        (whole.replace('"id"', '"x": 3, "id"'), "line 1: x is 3, not missing: "),
        (whole * 2, "line 2: sample is 0, not 1: "),
        (whole + whole.replace("0}", "1}") + whole, "line 3: samples=2 of the texts are 2 continuations alone: "),
    ):
        prompts.write_text(content)
        (problem,) = output_problems(str(prompts), True, {}, [{"id": 1, "text": "a"}], "continuation", 2)
        assert problem.startswith(f"output={prompts}, {why}")
        assert problem.endswith(": resume=true cannot go on")
    prompts.write_text('{"text": "!"}\n{"text": "z"}\n')
    small = reference_model(dataclasses.replace(TINY, vocab_size=60), seed=2, dtype=torch.float32)
    save_pretrained(small, tmp_path / "small")
    given = (f"prompts={prompts}", f"output={tmp_path / 'out'}", f"tokenizer={checkpoint / 'tokenizer.json'}")
    assert call(generate, f"checkpoint={tmp_path / 'small'}", *given) == 2
    assert f"cannot continue text 2 of prompts={prompts}: the prompt holds id " in capsys.readouterr().err
    assert call(generate, *words(checkpoint, f"prompts={prompts}", "output=/dev/full")) == 2
    assert capsys.readouterr().err == "error: output=/dev/full cannot be written: No space left on device\n"
    assert call(generate, f"checkpoint={checkpoint}", "resume=true", f"save_state={tmp_path}/s") == 2
    assert "error: resume=true goes on behind the lines of output, which is not set" in capsys.readouterr().err
    assert call(generate, f"checkpoint={checkpoint}", "prompt=a", "device=meta") == 2
    assert "error: device=meta is not available here: Cannot copy out of meta tensor" in capsys.readouterr().err
