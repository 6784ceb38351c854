"""Tables from rows: the newest of each, whole and in order, and the page in docs holds what its rows say."""

import json

import pytest

from launch import render_results
from launch.render_table import PAGE, ROWS, TABLES, fill, main, markdown
from launch.rows import KINDS, NotRows, kind_of, read

BASE = {"commit": "0123456789abcdef", "dirty": False, "command": "python -m x", "gpu": "NVIDIA H200", "cpu": None}
RUN = BASE | {
    "unit": "ms", "model": "1b", "parameters": 10, "engine": "zero1", "layout": "tp 2, cp 1, dp 1, sequence parallel",
    "recompute": "full, every 2 blocks", "replay": "CUDA graph", "gpus": 2, "sequence_length": 2048, "micro_batch": 8,
    "global_batch": 8, "tokens_per_second": 1e5, "utilisation_sampled": 0.8, "sampled_tflops": 660.4,
}  # fmt: skip


def step(name: str, value: float, date: str, **changes) -> dict:
    return RUN | {"name": name, "value": value, "date": date} | changes


def test_the_newest_row_of_each_thing_is_shown_in_order():
    rows = [
        step("training loop", 190.0, "2026-01-02", dirty=True, peak_gib=40.04),
        step("step", 180.0, "2026-01-03", utilisation_datasheet=0.5, datasheet_tflops=989.4, cpu="a host of GPUs"),
        step("step", 171.0, "2026-01-01"),
        step("step", 90.0, "2026-01-01", model="385m", parameters=4, sequence_length=64),
        BASE | {"name": "other", "unit": "s", "value": 1.0, "date": "2026-01-01"},
    ]
    layout = "2 x H200 | ZeRO 1, tp 2, sequence parallel, full recomputation every 2 blocks, CUDA graph"
    assert TABLES["training"].render(rows).splitlines()[2:] == [
        f"| 385m | 64 | {layout} | step | 90.0 | 100,000 | 80.0 % of 660 |  |  | 0123456 |",
        f"| 1b | 2048 | {layout} | step | 180.0 | 100,000 | 80.0 % of 660 | 50.0 % of 989 |  | 0123456 |",
        "|  |  |  |  | training loop | 190.0 | 100,000 | 80.0 % of 660 |  | 40.0 | 0123456+ |",
    ]


def test_both_passes_of_an_operator_are_one_line():
    operator = BASE | {"name": "sglu", "operator": "sglu", "unit": "ms", "shape": "4096 x 2048", "date": "2026-01-01"}
    rows = [
        operator | {"passes": "forward + backward", "value": 0.041, "floor_ms": 0.0313, "extra_mib": 16.0},
        operator | {"passes": "forward", "value": 0.018, "floor_ms": 0.01208},
        operator | {"passes": "forward", "value": 0.02, "by": "a peer"},
    ]
    assert TABLES["kernels"].render(rows).splitlines()[2:] == [
        "| sglu | 4096 x 2048 | here | 0.018 (1.49) | 0.041 (1.31) | 16 | H200 | 0123456 |",
        "|  | 4096 x 2048 | a peer | 0.020 |  |  | H200 | 0123456 |",
    ]


def test_only_what_stands_between_the_marks_is_replaced():
    page = "before\n<!-- rows: data stream -->\nold\n<!-- end of rows -->\nafter\n"
    row = BASE | {
        "name": "stream: read",
        "unit": "million tokens/s",
        "value": 60.8,
        "date": "2026",
        "gpu": None,
        "cpu": "A",
    }
    filled = fill(page, [row])
    assert filled.startswith("before\n<!-- rows: data stream -->\n| what |")
    assert filled.endswith("| read | 60.8 million tokens/s | A | 0123456 |\n<!-- end of rows -->\nafter\n")
    assert fill(filled, [row]) == filled


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (json.dumps(step("step", 1.0, "2026"))[:-9], "rows.jsonl:2: no JSON: Expecting ':' delimiter at col"),
        ("\xff", "rows.jsonl:2: no JSON: Expecting value at column 1"),
        ("[]", "rows.jsonl:2: a row is an object, not list"),
        ('{"name": "step"}', "rows.jsonl:2: command, date, unit, commit, gpu, cpu, value missing"),
        (json.dumps(step("step", 1.0, "2026") | {"layout": {"tp": 1}}), "rows.jsonl:2: layout is not a plain value"),
        (
            json.dumps(BASE | {"name": "result", "unit": "b", "value": 1.0, "date": "2026"}),
            "rows.jsonl:2: plan, run, va",
        ),
        (json.dumps(step("step", 1.0, "2026", gpus="2")), "rows.jsonl:2: gpus='2' must be a whole number above 0"),
        (json.dumps(step("step", 1.0, "2026", peak_gib="2")), "rows.jsonl:2: peak_gib='2' must be a number, or null"),
    ],
    ids=["torn", "bytes", "list", "keys", "nested", "keys of its kind", "type", "type or null"],
)
def test_what_is_no_row_is_named(tmp_path, capsys, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(step("step", 1.0, "2026")) + "\n" + line + "\n")
    assert main([str(path)]) == 2
    assert said in capsys.readouterr().err


def test_no_row_that_is_read_ends_in_a_traceback(tmp_path):
    """A row of each kind, with each of its keys missing or of another value, is refused or shown."""
    tables = TABLES | render_results.tables()
    page = "".join(f"<!-- rows: {name} -->\n<!-- end of rows -->\n" for name in tables)
    there = read([*ROWS.glob("*.jsonl"), render_results.ROWS / "time.jsonl"])
    samples = {kind_of(row): row for row in there if kind_of(row) and not row.get("variant")}
    assert samples.keys() == KINDS.keys()
    path, refused, shown = tmp_path / "rows.jsonl", 0, 0
    for kind, row in samples.items():
        for key in row:
            changed = [row | {key: value} for value in (None, "x", 0, float("inf"), 10**400, "\ud800")]
            for new in (*changed, {other: value for other, value in row.items() if other != key}):
                path.write_text(json.dumps(new))
                rows, why = [], ""
                try:
                    rows = read([path])
                except NotRows as error:
                    why = str(error)
                assert rows or (why.startswith(f"{path}:1: ") and (key in why or key == "name"))
                filled = fill(page, [*rows, *(other for name, other in samples.items() if name != kind)], tables)
                assert filled.encode()
                refused, shown = refused + bool(why), shown + len(rows)
    assert min(refused, shown) > 100


def test_a_cell_stays_within_its_column():
    assert markdown(("run",), [["model.name=a|b,\nlr=1"]]) == "| run |\n|---|\n| model.name=a\\|b, lr=1 |\n"


def test_the_page_holds_what_its_rows_say():
    rows = read(sorted(ROWS.glob("*.jsonl")))
    assert len(rows) > 100
    assert main(["--check"]) == 0, "run python -m launch.render_table"
    assert all(f"<!-- rows: {name} -->" in PAGE.read_text() for name in TABLES)
