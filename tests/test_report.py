"""The page of a run: in a browser without a network, light and dark, narrow and wide; and its charts."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch import compare, report, requeue, status, sync
from launch.chart import POINTS, Line, chart, thinned
from launch.curves import marks_of, series_of
from megatron_tn import plot
from megatron_tn.config import DataConfig, EvaluationConfig, ModelConfig, ScheduleConfig, TrainConfig, save
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.submission import Submission
from tests.helpers.browser import chromium
from tests.helpers.training import call

HOSTILE = "<script>document.title = 'taken'</script>\"'&"


def record(step: int, began: float) -> dict:
    return {
        "step": step,
        "loss": 2 + 8 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "applied": True,
        "tokens": 1000 * step,
        "samples": 4 * step,
        "tokens_per_second": 500.0,
        "utilisation": 0.5,
        "utilisation_sampled": 0.7,
        "step_seconds": 2.0,
        "world_size": 2,
        "steps_without_update": int(step > 50),
        "time": began + 2 * step,
    }


def make_run(path: Path) -> RunFolder:
    """100 steps in two starts, with a rewind and a failure, and texts that try to leave their places."""
    run = RunFolder(path)
    path.mkdir()
    model = ModelConfig(vocab_size=256, embed_dim=64, layers=2, heads=2, glu_dim=128)
    data = DataConfig(sequence_length=32, micro_batch=2, global_batch=4, manifest=HOSTILE)
    config = TrainConfig(model=model, data=data, schedule=ScheduleConfig(steps=200, warmup_steps=1), run_dir=str(path))
    save(replace(config, evaluation=EvaluationConfig(prompts=[HOSTILE])), run.config_file)
    records: list[dict] = [{"step": 0, "start/began": 1e9 - 20, "time": 1e9}]
    records += [record(step, 1e9) for step in range(1, 61)]
    records.append({"step": 60, "start/began": 1e9 + 300, "time": 1e9 + 320})
    records += [record(step, 1e9 + 320) for step in range(61, 101)]
    records.insert(80, {"step": 78, "rewind/from": 90, "rewind/skip": [85], "time": 1e9 + 477})
    for step in (50, 100):
        texts = [{"prompt": HOSTILE, "text": f"text of step {step}\n  {HOSTILE}"}]
        records.append({"step": step, "heldout_loss": 2.5, "heldout_bits_per_byte": 1.0, f"tasks/{HOSTILE}": 0.5})
        records.append({"step": step, "texts": texts, "memory/allocated_gib": 20.0, "memory/reserved_gib": 25.0})
    records.sort(key=lambda one: one["step"])
    killed = [record(step, 1e9) for step in range(61, 71)]  # steps of the first start that the second one repeats
    run.journal.superseded.write_text("".join(json.dumps(one) + "\n" for one in killed))
    run.journal.append([*records, {"step": 100, "stop/state": "failed", "stop/error": HOSTILE, "time": 1e9 + 530}])
    run.write_status("failed", 100, error=f"rank 0 stops: {HOSTILE}")
    submission = Submission.new(run)
    submission.record({"jobs": ["17"], "revision": "0123abc"})
    requeue.append(str(path), f"2026-11-29T20:00:00+0000 job=17 restart=0 code=75 cause={json.dumps(HOSTILE)} step=70")
    run.write_traceback(0, RuntimeError(HOSTILE))
    return run


def test_the_page_of_a_run_in_a_browser(tmp_path, capsys):
    folder = make_run(tmp_path / "a run of &lt;b> 100%").path
    assert call(report.main, str(folder)) == 0
    assert f"wrote {folder / 'report.html'}" in capsys.readouterr().out
    with chromium(tmp_path / "profile") as driver:
        run = driver.execute_script
        driver.get((folder / "report.html").as_uri())
        assert driver.title == folder.name
        assert driver.get_log("browser") == []
        assert run("return performance.getEntriesByType('resource').length") == 0
        assert run("return document.querySelectorAll('script, link, img, [src]').length") == 0
        said = run("return document.body.textContent")
        assert said.count(HOSTILE) >= 8  # error twice, prompt, text, task, requeue, traceback, setting
        titles = run("return [...document.querySelectorAll('h2')].map(each => each.textContent)")
        assert {"Goodput", "Loss", "Throughput", "Memory", "Progress", "Starts", "Rewinds"} <= set(titles)
        assert {"Memory of a GPU", "Generated texts", "Failures", "Settings", "Submissions", "Requeues"} <= set(titles)
        assert "text of step 100" in run("return document.querySelector('details[open]').innerText")
        for words in ("from step 90 to 78; skipped batches: [85]", "50.0%", "70.0%", "36.4%"):
            assert words in said
        charts = run("return [...document.querySelectorAll('svg.chart')].map(each => each.getAttribute('aria-label'))")
        assert "Loss by tokens: nats a token by tokens" in charts
        assert "Peak of a GPU: GiB by step" in charts
        wide = "[...document.querySelectorAll('svg.chart')].every(each => each.getBoundingClientRect().width > 300)"
        assert run(f"return {wide}")
        marked = "[...document.querySelectorAll('figure')].map(each => each.querySelectorAll('.mark').length)"
        marks = run(f"return {marked}")
        assert set(marks) <= {0, 2}  # one restart, one rewind
        assert marks.count(2) == len(charts) - charts.count("Held-out loss by position")
        starts = "[...document.querySelectorAll('h2')].find(each => each.textContent == 'Starts').nextElementSibling"
        rows = run(f"return [...{starts}.nextElementSibling.querySelectorAll('tr')].map(each => each.innerText)")
        cells = [row.split("\t") for row in rows[1:]]
        assert [row[2:4] + row[5:] for row in cells] == [
            ["0", "70", "without a word"],
            ["60", "100", f"failed: {HOSTILE}"],
        ]
        colours = []
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            colours.append(run("return getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(255, 255, 255)", "rgb(21, 24, 29)"]
        for width in (1200, 400):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            assert run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("main", [compare.main, plot.main, report.main, status.main, sync.main])
def test_a_command_without_words_says_what_it_does(main, capsys):
    for words, code in (((), 2), (("--help",), 0)):
        assert call(main, *words) == code
        assert "python -m " in capsys.readouterr().out


def test_a_run_that_has_only_begun_or_whose_settings_are_damaged_has_a_page(tmp_path, capsys):
    run = RunFolder(tmp_path / "new\x1b[31m\udcff")
    run.path.mkdir()
    run.journal.append([{"step": 0, "start/began": 1.0, "time": 2.0}])
    run.config_file.write_text("{")
    assert call(report.main, str(run.path)) == 0
    assert "config.json" in (run.path / "report.html").read_text()
    run.journal.append([{"step": 1, "loss": 2.0, "tokens": 1, "tokens_per_second": 1.0, "step_seconds": 1.0}])
    for main in (compare.main, plot.main):
        assert call(main, str(run.path)) == 0
    assert r"new\x1b[31m\udcff" in (run.path / "compare.md").read_text()
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    run.journal.append([{"step": 2, "loss": 10**400, "tokens": 1, "tokens_per_second": 1.0, "step_seconds": 1.0}])
    for main in (report.main, compare.main, plot.main):
        assert call(main, str(run.path)) == 2
        assert "udcff: log.jsonl has records that no run wrote: OverflowError" in capsys.readouterr().err
    os.mkfifo(run.journal.superseded)
    assert call(report.main, str(run.path)) == 2
    assert "log.superseded.jsonl: not a regular file" in capsys.readouterr().err
    assert call(report.main, str(tmp_path / "nowhere")) == 2
    assert call(report.main, str(run.path), str(run.path)) == 2
    assert "2 runs; a report is of one" in capsys.readouterr().err


def test_marks_and_series_of_a_journal(tmp_path):
    records = make_run(tmp_path / "run").records()
    restart, rewind = marks_of(records)
    assert (restart["step"], restart["tokens"], restart["seconds"]) == (60, 60_000, 120.0)
    assert (rewind["kind"], rewind["step"]) == ("rewind", 78)
    series = series_of([*records, {"step": 101, "loss": None}])
    assert series["starts"] == (list(range(1, 102)), [1] * 60 + [2] * 41)
    assert series_of(records, [1e9 - 20, 1e9, 1e9 + 300])["starts"][1][-1] == 3  # one of superseded steps
    assert series["perplexity"][1][0] == pytest.approx(math.exp(10))
    assert math.isnan(series["loss"][1][-1])
    assert series["tokens_per_second_per_gpu"][1] == [250.0] * 100


def test_a_long_line_is_drawn_as_means_within_the_band_of_its_values():
    y = np.ones(10 * POINTS)
    y[123] = 50.0
    y[20:30] = np.nan
    line = thinned(Line("", np.arange(len(y)), y))
    assert len(line.x) == POINTS
    assert (line.y[12], line.low[12], line.high[12]) == (pytest.approx(5.9), 1.0, 50.0)
    assert math.isnan(line.y[2])
    drawn = chart("Loss", [line], x_label="step", y_label="nats")
    assert len(re.findall(r"M[\d.]+ [\d.]+L", re.search(r'class="line [^"]*" d="([^"]*)"', drawn)[1])) == 2  # a gap


@pytest.mark.parametrize("values", [[1e-3, 1e4], [2.0, 2.0], [0.0, 0.0], [-1.0, 1e-12], [1e9, 1e9 + 1]])
@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_axes_of_any_range_have_ticks_inside_the_drawing(values, log):
    drawn = chart("t", [Line("", [0, 10], values)], x_label="x", y_label="y", log=log, level=(3.0, "level"))
    if log and max(values) <= 0:
        assert drawn == ""
        return
    assert "nan" not in drawn
    ticks = [float(y) for y in re.findall(r'<text class="soft" x="56" y="([-\d.]+)"', drawn)]
    assert 1 <= len(ticks) <= 12
    assert all(0 <= y <= 235 for y in ticks)


def test_nothing_to_draw_is_no_chart():
    assert chart("t", [Line("", [], []), Line("", [1], [math.nan])], x_label="x", y_label="y") == ""
