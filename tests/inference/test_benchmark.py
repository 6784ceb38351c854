"""The benchmark of decoding writes rows on any machine."""

import json
import sys

import pytest

from megatron_tn.benchmarking import decode


def test_a_row_for_each_batch_and_position(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    words = ["--model", "demo", "--rows", "1", "2", "--positions", "0", "1000", "--tokens", "2", "--output"]
    monkeypatch.setattr(sys, "argv", ["decode", *words, str(output)])
    decode.main()
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["batch"], row["position"]) for row in found] == [(1, 0), (2, 0), (1, 1000), (2, 1000)]
    assert all(row["name"] == "decoding" and row["value"] > 0 for row in found)
    decode.main(["--model", "demo", "--tokens", "2", "--fp8-weights"])
    said = capsys.readouterr().out
    assert "demo, batch 2, after 1000 tokens:" in said
    assert "demo, fp8 weights, batch 1, after 0 tokens:" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--model 2b", "--model 2b: conf/model has no such file"),
        (
            "--model demo --peer retnet --positions 999 --tokens 1",
            "peer retnet needs the extra bench: pip install",
        ),
        ("--peer llama --positions 8 --tokens 2", "--positions 8 must be more than 15, the tokens that are decoded"),
        ("--peer llama --positions 999 --fp8-weights", "--fp8-weights does not go with --peer llama: only our model"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, words, line):
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(SystemExit) as stop:
        decode.main(words.split())
    assert stop.value.code == 2
    assert f"error: {line}" in capsys.readouterr().err
