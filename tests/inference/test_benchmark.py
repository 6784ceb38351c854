"""The benchmark of decoding writes rows on any machine."""

import json
import sys

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
