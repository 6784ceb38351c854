"""docs/results.md from rows: means over seeds, the corpus, curves, and the time to the same loss."""

import json

import pytest

from launch import render_results
from launch.render_table import fill
from launch.rows import NotRows

BASE = {
    "commit": "0123456789",
    "command": "c",
    "date": "2026-01-01",
    "gpu": "NVIDIA H200",
    "cpu": None,
    "unit": "bits/byte",
}
RESULT = BASE | {"name": "result", "plan": "results_50m", "model": "50m", "variant": "", "lr": 0.002}
RESULT |= {"tokens": 60_000_000, "sequence_length": 2048, "global_batch": 32}


def trained(variant: str, lr: float, seed: int, *bits: float, **other) -> dict:
    """bits: of the evaluations, after equally many tokens; the last one is the row's value."""
    tokens = RESULT["tokens"] / 1e6 / len(bits)
    curve = " ".join(f"{tokens * number:.3f}:{value:.4f}" for number, value in enumerate(bits, 1))
    row = RESULT | {"plan": "results_time", "variant": variant, "lr": lr, "seed": seed, "value": bits[-1]}
    return row | {"curve": curve} | other


def measured(layout: str, milliseconds: float, **other) -> dict:
    row = {key: RESULT[key] for key in (*BASE, "model", "sequence_length", "global_batch")}
    row |= {"name": "training loop", "layout": layout, "value": milliseconds, "tokens_per_second": 65.536e6 / 65.5}
    return row | other


def time_to_loss(rows: list[dict]) -> list[list[str]]:
    """The table's cells, without titles and without GPU and commit."""
    page = "<!-- rows: time to the same loss -->\n<!-- end of rows -->\n"
    lines = fill(page, rows, render_results.tables()).splitlines()[3:-1]
    return [line.strip("| ").split(" | ")[:-2] for line in lines]


SHORT_RUN = (
    "50m,optim=muon,optim.momentum=0.8,optim.equal_norms=True,schedule=wsd,schedule.decay_fraction=0.5,"
    "optim.heads_apart=True,optim.beta1=0.8,optim.lr=0.001,seed=0"
)


def test_time_to_the_same_loss_is_read_from_the_curves():
    rows = [
        *(trained("", lr, 0, 2.0, value, plan="results_50m") for lr, value in ((0.001, 1.5), (0.004, 1.45))),
        *(trained("", 0.002, seed, 2.0, 1.6, 1.4 + seed / 100) for seed in (0, 1, 2)),  # 1.41 after 60 M tokens
        *(trained("muon", lr, 0, 1.9, value, 1.31) for lr, value in ((0.001, 1.4), (0.002, 1.39))),
        trained("muon", 0.001, 1, 1.8, 1.4, 1.29),  # mean 1.85, 1.40, 1.30: 1.41 at 20 M + 20 M * 0.44 / 0.45
        trained("fp8", 0.002, 0, 2.0, 1.7, 1.45),
        trained("muon,fp8", 0.001, 0, 1.4, 1.3, 1.25),
        trained("muon,0.8", 0.001, 0, 1.9, 1.3, 1.2, run="50m,optim=muon,optim.momentum=0.8,optim.lr=0.001,seed=0"),
        trained("muon,True", 0.001, 0, 1.9, 1.21, run="50m,optim=muon,optim.heads_apart=True,optim.lr=0.001,seed=0"),
        trained("muon,short", 0.001, 0, 1.9, 1.2, run=SHORT_RUN),
        trained("18", 0.016, 0, 1.2, run="50m,schedule.warmup_steps=18,optim.lr=0.016,seed=0", plan="results_defaults"),
        trained("0.8", 0.002, 0, 1.9, 1.3, run="50m,optim.beta1=0.8,optim.lr=0.002,seed=0"),  # not today's AdamW
        trained("muon,fp8,300", 0.001, 0, 1.7, 1.4, tokens=30_000_000, curve="15.0:1.7000 30.0:1.4000"),
        trained("paper/decay/none", 0.001, 0, 1.0, 1.0),  # of another table
        *(measured("tp 1", value) for value in (70.0, 65.536, 60.0)),  # 1 us a token
        measured("tp 1, Muon", 131.072),
        measured("tp 1", 900.0, commit="of an earlier day", date="2025-12-31"),
        measured("tp 1", 80.0, commit="of a later day", date="2026-01-02", micro_batch=4),  # slower than at 8
        measured("tp 1, Muon, heads apart", 65.536),
        measured("tp 1, Muon, fp8 products", 32.768),
        measured("tp 1, Muon", 1.0, global_batch=8),
    ]
    found = [[cells[0], cells[4], *cells[1:4], *cells[5:]] for cells in time_to_loss(rows[::-1])]
    assert found == [
        ["50m", "60.0 M", *line]
        for line in (
            ["AdamW, bf16", "0.002 (of 3, bracketed)", "3", "1.4100 ± 0.0100", "65.5", "60.0 M", "60.0", "1.00"],
            ["AdamW, bf16, beta1 0.8", "0.002 (the only one)", "1", "1.3000", "65.5", "54.5 M", "54.5", "0.91"],
            ["Muon, bf16", "0.001 (of 2, not bracketed)", "2", "1.3000 ± 0.0141", "131.1", "39.6 M", "79.1", "1.32"],
            ["Muon, bf16, heads_apart True", "0.001 (the only one)", "1", "1.2100", "65.5", "51.3 M", "51.3", "0.86"],
            ["Muon, bf16, momentum 0.8", "0.001 (the only one)", "1", "1.2000", "131.1", "36.3 M", "72.7", "1.21"],
            [
                *("Muon, bf16, settings for short schedules, beta1 0.8", "0.001 (the only one)", "1", "1.2000"),
                *("65.5", "51.0 M", "51.0", "0.85"),
            ],
            ["AdamW, fp8", "0.002 (the only one)", "1", "1.4500", "", "not reached", "", ""],
            ["Muon, fp8", "0.001 (the only one)", "1", "1.2500", "32.8", "20.0 M", "10.0", "0.17"],
        )
    ] + [["50m", "30.0 M", "Muon, fp8", "0.001 (the only one)", "1", "1.4000", "32.8", "29.5 M", "14.8", "0.25"]]
    assert time_to_loss(rows[5:]) == []  # nothing to compare with
    odd = [
        measured("tp 1", 9.0, gpus=8),
        trained("", 0.002, 3, 1.0, curve=""),
        trained("muon", 0.008, 0, 1.0, curve=""),
    ]
    found[0][3], found[2][3] = "0.002 (of 3, bracketed)", "0.001 (of 3, not bracketed)"
    assert [[cells[0], cells[4], *cells[1:4], *cells[5:]] for cells in time_to_loss([*rows, *odd])] == found
    assert time_to_loss(odd) == []
    assert time_to_loss([trained("", 0.002, seed, 1.5, curve=f"{seed}.0:1.5") for seed in (1, 2)]) == []


def test_the_page_shows_means_and_spread_of_seeds():
    found = [
        RESULT | {"seed": seed, "value": 1.2 + seed / 10, "sources/code": 0.8, "positions/64": 1.5} for seed in (0, 1)
    ]
    page = "".join(f"<!-- rows: {name} -->\n<!-- end of rows -->\n" for name in ("50m", "50m positions", "curves"))
    diverged = found[0] | {"lr": 0.004, "value": float("inf"), "curve": "60.0:inf"}
    lines = fill(page, [diverged, *found], render_results.tables()).splitlines()
    assert render_results.curves([diverged, *found], "results_50m") == {"50m": found}
    assert "| 50m | 0.004 | 1 | 60.0 M | 1 of 1 diverged | 0.8000 |  |  |  | H200 | 0123456 |" in lines
    assert "| 50m | 0.002 | 2 | 60.0 M | 1.2500 ± 0.0707 | 0.8000 ± 0.0000 |  |  |  | H200 | 0123456 |" in lines
    assert "| 50m | 0.002 |  | 1.5000 ± 0.0000 |  |  |  |  |" in lines
    assert "![held-out bits per byte by tokens and by seconds](results.png)" in lines


def test_a_run_is_compared_with_the_base_by_seed():
    bits = {"paper/base": {0: 1.5, 1: 1.7}, "paper/act/none": {0: 1.6, 1: 1.82, 2: 1.9}}
    found = [
        RESULT | {"plan": "results_ablations", "variant": variant, "seed": seed, "value": value}
        for variant, of in bits.items()
        for seed, value in of.items()
    ]
    lines = fill("<!-- rows: ablations -->\n<!-- end of rows -->\n", found, render_results.tables()).splitlines()
    assert lines[1].startswith("| variant | peak rate | seeds | tokens | bits/byte | to base |")
    assert lines[3].startswith("| act/none | 0.002 | 3 | 60.0 M | 1.7733 ± 0.1553 | +0.1100 ± 0.0141 |")
    assert lines[4].startswith("| base | 0.002 | 2 | 60.0 M | 1.6000 ± 0.1414 |  |")
    found = [
        RESULT | {"plan": "results_defaults", "seed": 0, "value": value, "run": f"50m,{own}optim.lr=0.004,seed=0"}
        for own, value in (("", 1.25), ("schedule.warmup_steps=18,", 1.23))
    ]
    lines = fill("<!-- rows: defaults -->\n<!-- end of rows -->\n", found, render_results.tables()).splitlines()
    assert lines[3] == "| as in results.yaml | 0.002 | 1.2500 |  | H200 | 0123456 |"
    assert lines[4] == "| warmup_steps 18 | 0.002 | 1.2300 | -0.0200 | H200 | 0123456 |"


def test_the_page_shows_the_corpus(tmp_path, monkeypatch):
    found = {"documents": 1234, "bytes": 5_600_000, "tokens": 1_500_000}
    package = {"version": "1:2-3", "source": "code", "licence": "MIT", "files": 7, "bytes": 900_000}
    shared = {"code": {"passages": 0.125, "documents": 59, "over_half": 6}}
    summary = {
        "overlap": shared,
        "sources": {"code": {"train": found}},
        "stages": {"read": found},
        "packages": {"made": package},
    }
    (tmp_path / "corpus.json").write_text(json.dumps(summary))
    monkeypatch.setattr(render_results, "ROWS", tmp_path)
    blocks = "".join(
        f"<!-- rows: {name} -->\n<!-- end of rows -->\n" for name in ("corpus", "overlap", "stages", "packages")
    )
    lines = fill(blocks, [], render_results.tables()).splitlines()
    assert "| code | 1,234 | 5.6 | 1,500,000 | 0 | 0.0 | 0 |" in lines
    assert "| code | 12.5 % | 59 | 6 |" in lines
    assert "| read | 1,234 | 5.6 |" in lines
    assert "| made | 1:2-3 | MIT | code | 7 | 0.9 |" in lines
    damaged = {"{": "Expecting property name", '{"stages": {"read": {}}}': "documents missing", "[]": "list indices"}
    for content, said in damaged.items():
        (tmp_path / "corpus.json").write_text(content)
        with pytest.raises(NotRows, match=f"corpus.json: .*{said}"):
            fill("<!-- rows: stages -->\n<!-- end of rows -->\n", [], render_results.tables())


def test_curves_are_of_the_best_rate_and_drawn(tmp_path):
    found = [
        RESULT | {"seed": 0, "value": value, "lr": lr, "curve": "10.0:1.5 20.0:1.3"}
        for lr, value in ((0.001, 1.4), (0.002, 1.2))
    ]
    assert [row["lr"] for row in render_results.curves(found, "results_50m")["50m"]] == [0.002]
    render_results.draw([*found, measured("tp 1", 65.5)], "results_50m", tmp_path / "a.png")
    assert 1_000 < (tmp_path / "a.png").stat().st_size < 100_000


def test_the_page_in_the_repository_is_up_to_date():
    assert render_results.main(["--check"]) == 0
