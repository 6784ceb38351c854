"""What a run says of itself: tables, pictures, and speeds that count training alone."""

import json
import logging
import math
import re
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from launch import compare
from megatron_tn import plot
from megatron_tn.benchmark import main as benchmark
from megatron_tn.config import DataConfig, EngineConfig, ModelConfig, ParallelConfig, ScheduleConfig, TrainConfig, save
from megatron_tn.loading import open_weights
from megatron_tn.planning import host
from megatron_tn.training.compare import as_many, group_names
from megatron_tn.training.curve import curve_of, draw, positions_of
from megatron_tn.training.hooks.console import ConsoleProgress
from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.journal_file import JournalFile
from megatron_tn.training.run import Run
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import StepReport
from megatron_tn.training.summary import figures_of, show_end, show_start
from megatron_tn.training.throughput import Work
from tests.helpers.ranks import layout
from tests.helpers.training import SMALL, call

REPORT = StepReport(loss=2.5, tokens=100, lr=3e-4, grad_norm=1.0, applied=True, stop=False)


def make_run(path: Path, steps: int, loss: float) -> RunFolder:
    folder = RunFolder(path)
    path.mkdir(parents=True)
    records = [{"step": s, "loss": loss, "tokens": 10 * s, "tokens_per_second": 7.0 * s} for s in range(1, steps + 1)]
    records.append({"step": steps, "heldout_loss": loss + 1})
    folder.journal.path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_speeds_do_not_count_evaluations_and_saves(tmp_path, capsys):
    work, state = Work(1, 1, None), TrainingState()
    folder = RunFolder(tmp_path)
    hooks = Journal(folder.journal, StepFigures(work)), ConsoleProgress(2, work)
    for hook in hooks:
        hook.on_start(state)
    for _ in range(2):
        with work.clock.pause():
            time.sleep(0.5)
        state.count(REPORT, samples=1)
        for hook in hooks:
            hook.on_step(state, REPORT)
        state.held_out = {"step": 1, "heldout_loss": 2.25}
    assert all(record["step_seconds"] < 0.25 for record in folder.records("loss"))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2  loss 2.500  lr 3.00e-04  ")
    assert last.startswith("step 2/2  loss 2.500  held-out 2.250  lr 3.00e-04  ")


@pytest.mark.parametrize(("products", "kernels"), [("bf16", "Triton"), ("fp8", "Triton; fp8 products are emulated")])
def test_the_start_says_what_is_emulated(capsys, products, kernels):
    config = TrainConfig(engine=EngineConfig(products=products))
    show_start(config, layout(1), torch.device("cpu"), parameters=1, kernels="Triton", step=0, epoch_samples=1)
    assert re.search(rf"kernels +│ {kernels} +│", capsys.readouterr().out)


def test_the_end_names_figures_files_and_next_commands(tmp_path, capsys):
    folder = make_run(tmp_path / "run", 20, 2.0)
    figures = {"step": 20, "tokens": 200, "loss": 2.0, "heldout_loss": 3.0, "tokens_per_second": 73.5}
    assert figures_of(folder) == figures
    show_end(TrainConfig(run_dir=str(folder), schedule=ScheduleConfig(steps=20)), folder, "finished")
    said = capsys.readouterr().out
    for words in ("20 of 20", "2.000", "3.000", "megatron_tn.generate checkpoint=", f"megatron_tn.plot {folder}"):
        assert words in said


def test_a_journal_with_foreign_records_ends_no_run_with_an_error(tmp_path, caplog):
    folder = make_run(tmp_path / "run", 20, 2.0)
    folder.journal.append([{"step": 20, "loss": {"a": 1}, "time": time} for time in ("now", 1.0)])
    run = Run(TrainConfig(run_dir=str(folder), schedule=ScheduleConfig(steps=20)), None, open_weights)
    run.is_first = True
    run.sinks = [Journal(folder.journal, StepFigures(Work(1, 1, None)))]
    run._record_stop("finished", {})
    run._sum_up("finished")
    said = [record.message.partition(" cannot")[0] for record in caplog.records]
    assert said == ["goodput", "loss.png", "the table"]
    assert folder.records("stop/state")[-1]["stop/state"] == "finished"


def test_plot_takes_runs_and_folders_of_runs(tmp_path, capsys):
    make_run(tmp_path / "sweep" / "0_optim.lr-0.1", 5, 2.0)
    make_run(tmp_path / "sweep" / "1_optim.lr-0.2", 5, 3.0)
    assert call(plot.main, str(tmp_path / "sweep")) == 0
    said = capsys.readouterr().out
    assert "0_optim.lr-0.1" in said
    assert (tmp_path / "sweep" / "loss.png").stat().st_size > 1000
    assert call(plot.main, str(tmp_path / "nothing")) == 2
    assert "nothing: there is no run" in capsys.readouterr().err
    assert call(plot.main, str(tmp_path / "sweep"), f"output={tmp_path}/all.txt") == 2
    assert "all.txt must end in .png, .svg, .pdf: the ending is the picture's format" in capsys.readouterr().err
    assert call(plot.main, "outptu=all.png") == 2
    assert "error: unknown setting outptu=all.png; there is output=\n" in capsys.readouterr().err
    assert call(plot.main, "output=all.png") == 2
    assert "error: no run is named" in capsys.readouterr().err


def test_losses_by_position_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run(tmp_path / "run", 5, 2.0)
    folder.journal.append([{"step": 5, "heldout_loss": 2.5, "heldout_loss/after_1": 4.0, "heldout_loss/after_2": 3.0}])
    assert positions_of([folder]) == {1: 4.0, 2: 3.0}
    evaluation = {"positions": {"1": {"nats_per_token": 4.5}, "2": {"nats_per_token": 3.5}}}
    (tmp_path / "other.json").write_text(json.dumps(evaluation))
    (tmp_path / "tasks.json").write_text("{}")
    assert call(plot.main, "run", "other.json") == 0
    assert "wrote loss.png" in capsys.readouterr().out
    assert call(plot.main, "other.json", "output=alone.png") == 0
    for folder_of_file in ("a", "b"):  # files of one name, and one of a run's name
        (tmp_path / folder_of_file).mkdir()
        shutil.copy("other.json", f"{folder_of_file}/other.json")
    shutil.copy("other.json", "run.json")
    with mock.patch("megatron_tn.plot.draw") as drawn:
        assert call(plot.main, "run", "run.json", "a/other.json", "b/other.json") == 0
    (groups, _, evaluated), _ = drawn.call_args
    assert [*groups, *evaluated] == ["run", "run.json", "a/other.json", "b/other.json"]
    assert (tmp_path / "alone.png").stat().st_size < (tmp_path / "loss.png").stat().st_size
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a label as long as two paths left no room for curves
        assert draw({f"data.manifest={'a' * 300}": folder, f"data.manifest={'b' * 300}": folder}, Path("long.png"))
    names = ("heldout_loss", "heldout_bits_per_byte", "heldout_loss/after_1")
    folder.journal.append([{"step": 5} | dict.fromkeys(names, math.nan)])  # a run that diverged
    assert math.isnan(positions_of([folder])[1])
    assert draw({"diverged": folder}, Path("diverged.png"))
    assert call(plot.main, "tasks.json") == 2
    assert "error: tasks.json: it is no output of megatron_tn.evaluate" in capsys.readouterr().err


def test_a_curve_reads_each_journal_a_fixed_number_of_times(tmp_path, monkeypatch):
    read, reads = JournalFile.read, []
    monkeypatch.setattr(JournalFile, "read", lambda self, key: reads.append(self.path) or read(self, key))
    run = make_run(tmp_path / "run", 100, 2.0)
    run.journal.append([{"step": 104, "loss": 2.0, "tokens": 1080, "step_seconds": 3.0}])
    run.journal.append([{"step": step, "heldout_loss": 2.5} for step in (102, 105)])  # between records, and after all
    curve = curve_of([run])
    assert curve.held_out.tolist() == [[1000.0, 0.0, 3.0], [1040.0, 6.0, 2.5]]
    assert len(reads) == 2


def config(**data) -> TrainConfig:
    model = ModelConfig(vocab_size=256, embed_dim=64, layers=4, heads=2, glu_dim=128)
    data = {"sequence_length": 32, "micro_batch": 2, "global_batch": 4} | data
    return TrainConfig(model=model, data=DataConfig(**data), schedule=ScheduleConfig(steps=10, warmup_steps=1))


def test_what_cannot_fit_into_this_machine_is_refused(monkeypatch):
    monkeypatch.setattr(host, "free_bytes", lambda: 2 * 2**30)
    assert host.host_memory_problems(config(), 1, 1) == []
    (line,) = host.host_memory_problems(config(micro_batch=32768, global_batch=32768), 1, 1)
    assert "but this machine has 2.0 GiB free" in line
    assert "data.micro_batch=32768" in line
    (line,) = host.step_memory_problems(config(global_batch=2**23), 1, 1)
    assert line.startswith("data.global_batch=8388608 x data.sequence_length=32: ")
    assert "a step need 4.0 GiB of memory in 1 process, but this machine has 2.0 GiB free" in line
    assert host.step_memory_problems(config(global_batch=2**23), 4, 1) == []
    (line,) = host.host_memory_problems(config(), 8, 8)
    assert "in 8 processes" in line


def test_a_benchmark_that_cannot_fit_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(host, "free_bytes", lambda: 2**20)
    assert call(benchmark, *SMALL) == 2
    assert "but this machine has 0.0 GiB free" in capsys.readouterr().err


def test_a_long_run_without_a_gpu_says_what_it_will_cost(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert host.cpu_cost(config(), 1) == ""
    monkeypatch.setattr(host, "WORTH_TIMING_S", 0)
    monkeypatch.setattr(host, "_seconds", lambda config, model: 0.5 + 0.25 * model.layers)
    # A microbatch 1.5 s; 2 of them a step; 10 steps.
    said = host.cpu_cost(config(), 1)
    assert said.startswith("no GPU: a microbatch takes about 1.5 s, a step 3 s (4 sequences over 1 process)")
    assert said.endswith("10 steps about 30 s")
    said = host.cpu_cost(replace(config(), parallel=ParallelConfig(tp=2)), 2)
    assert said.endswith("(4 sequences over 2 processes), 10 steps at least 15 s")
    assert caplog.text == ""
    host.cpu_cost(config(sequence_length=2**20), 1)
    assert "no GPU: a microbatch of 2,097,152 tokens is timed" in caplog.text


@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_are_timed_by_themselves(layers):
    model = ModelConfig(vocab_size=256, embed_dim=64, layers=layers, heads=2, glu_dim=128)
    assert host._seconds(config(), model) > 0


def test_runs_that_differ_in_their_seed_alone_are_one_row_and_one_curve(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base = TrainConfig()
    gateless = replace(base, model=replace(base.model, gate=False))
    for name, config, losses in (("plain", base, (3.0, 3.2)), ("gateless", gateless, (2.0, 2.2))):
        for seed, loss in enumerate(losses):
            folder = make_run(tmp_path / f"{name}{seed}", 5, loss)
            save(replace(config, seed=seed, run_dir=str(folder.path)), folder.config_file)
    again = make_run(tmp_path / "again", 5, 2.2)  # of gateless1's settings and seed, and later
    save(replace(gateless, seed=1), again.config_file)
    again.journal.append([{"step": 5, "time": 1e9}])
    diverged = [make_run(tmp_path / f"diverged{seed}", 5, 1.0) for seed in (0, 1)]
    for seed, folder in enumerate(diverged):
        save(replace(base, optim=replace(base.optim, lr=1.0), seed=seed), folder.config_file)
    journal = diverged[1].journal.path
    journal.write_text(re.sub(r'loss": [0-9.]+', 'loss": null', journal.read_text()))
    behind = make_run(tmp_path / "behind", 2, 3.1)  # still under way
    save(replace(base, seed=2, run_dir=str(behind.path)), behind.config_file)
    assert call(compare.main, str(tmp_path)) == 0
    said = capsys.readouterr().out
    first, second, diverged = map(said.index, ("model.gate=false", "│ reference", "optim.lr=1.0 "))
    assert first < second < diverged
    assert "nan ± nan" in said
    assert re.search(r"model.gate=false.* 2 .* 2.100 ± 0.141 .* 3.100 ± 0.141 ", said)
    page = (tmp_path / "compare.html").read_text()
    assert "<td>2.100 ± 0.141</td>" in page
    for by in ("tokens", "seconds of training steps"):
        assert f'aria-label="Loss by {by}: nats a token by {by}"' in page
    assert "<title>model.gate=false 2.1, tokens 50</title>" in page
    assert (tmp_path / "compare.png").stat().st_size > 1000
    left_out = f"{tmp_path}/gateless1 is left out: {again} is a later run of its settings and seed"
    assert left_out in page
    assert left_out in said
    assert f"{behind} is at 20 tokens, others of its settings at 50: their row is a mean of unequal runs" in said
    text = (tmp_path / "compare.md").read_text()
    assert re.search(r"\| reference \| 3 \| 20 to 50 \|.*\| - \|\n", text)
    assert re.search(r"\| model.gate=false \| 2 \| 50 \| 2.100 ± 0.141 \|.*\| -1.000 ± 0.000 \|\n", text)
    assert as_many(204_728, 204_800)  # one padded sequence
    note = "to reference: difference in held-out from its run of the same seed after equal tokens"
    assert all(note in shown for shown in (page, text, said))
    curve = curve_of([RunFolder(tmp_path / f"plain{seed}") for seed in (0, 1)])
    assert (curve.loss.tolist(), curve.lowest.tolist(), curve.highest.tolist()) == ([3.1] * 5, [3.0] * 5, [3.2] * 5)
    assert curve.tokens.tolist() == [10, 20, 30, 40, 50]
    assert curve.held_out[0, 2] == pytest.approx(4.1)
    assert call(compare.main, str(tmp_path / "nothing")) == 2
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "80")
    assert call(compare.main, str(tmp_path)) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert {len(row) for row in rows} == {80}
    assert any(re.match(r"│ optim.lr=1.0 +│ 2 ", row) for row in rows)  # a name and figures are whole
    assert any("│ 2.100 ± │ 3.100 ±" in row for row in rows)
    assert "reference: the value that most rows have" in page


def test_a_group_is_named_by_what_sets_it_apart():
    settings = [
        {"model.name": "s", "model.layers": 2, "optim.lr": 1e-3, "model.norm": "simplermsnorm"} for _ in range(4)
    ]
    settings[1]["model.norm"] = "rmsnorm"
    settings[2] |= {"model.name": "m", "model.layers": 4}
    settings[3]["optim.lr"] = 2e-3
    names = group_names(settings, [["a"], ["b"], ["c"], ["d"]])
    assert names == [
        *("model.name=s", "model.name=s, model.norm=rmsnorm", "model.name=m"),
        "model.name=s, optim.lr=0.002",
    ]
    assert group_names(settings[:2], [["a"], ["b"]]) == ["model.norm=simplermsnorm", "model.norm=rmsnorm"]
    many = [{str(key): value for key in range(6)} for value in (0, 0, 1)]
    assert group_names(many, [["a"], ["b"], ["c", "d"]]) == ["reference", "reference", "c, d"]
