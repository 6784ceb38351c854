"""A plan of runs: which are left, what is read from them, when it stops."""

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import megatron_tn.benchmark
from launch.results.__main__ import main, stages
from launch.results.planned_run import Run
from launch.results.run_plan import Bad, grid_runs, read_plan
from launch.results.runs import Failed, Programs
from megatron_tn import cli
from megatron_tn.config import (
    BenchmarkConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    from_mapping,
    save,
)
from megatron_tn.training.run_folder import RunFolder

PLAN = """
settings: {experiment: results}
evaluations:
  long: {split: heldout, sequence_tokens: 9}
pieces:
  rates:
    - {model: [ours, rival], optim.lr: [1.0e-3, 2.0e-3, 4.0e-3], seed: [0]}
  seeds:
    - {model: [ours], optim.lr: [best of ours], seed: [0, 1, 2]}
  again:
    - {model: [ours], optim.lr: [2.0e-3], seed: [0, 3]}
    - {model: [ours], optim.lr: [best of ours], seed: [3]}
  speed:
    - {model: [ours, rival], benchmark.loop_steps: [20]}
"""
BITS = {"ours": {0.001: 1.4, 0.002: 1.2, 0.004: 1.3}, "rival": {0.001: 1.25, 0.002: 1.5, 0.004: 1.6}}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    for split in ("train", "heldout", "pieces"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "manifest.json").touch()
    return tmp_path


@pytest.fixture
def programs(monkeypatch):
    """Stand-ins for the command lines, which leave the files that those leave; the list of calls."""
    calls = []

    def run(self, module, words, log, gpu=None):
        said = dict(word.split("=", 1) for word in words) | {"gpu": gpu}
        calls.append((module, said))
        if module == "megatron_tn.train":
            folder, lr, seed = Path(said["run_dir"]), float(said["optim.lr"]), int(said["seed"])
            folder.mkdir(parents=True, exist_ok=True)
            config = TrainConfig(seed=seed, model=ModelConfig(name=said["model"]), optim=OptimConfig(lr=lr))
            save(config, folder / "config.json")
            steps = [{"step": n, "loss": 5.0 - n, "tokens": n * 1_000_000, "tokens_per_second": 10.0} for n in (1, 2)]
            held_out = [{"step": 2, "heldout_loss": 3.0, "heldout_bits_per_byte": 1.5}]
            (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps + held_out))
        elif module == "megatron_tn.evaluate":
            config = json.loads(Path(said["checkpoint"], "config.json").read_text())
            bits = BITS[config["model"]["name"]][config["optim"]["lr"]] + config["seed"] / 100
            found = {"tokens": 7, "text_bytes": 20, "bits_per_byte": {"model": bits, "gzip -9": 2.0, "xz -9": 1.9}}
            whole = "heldout/" in said["manifest"]
            found["bits_per_byte"]["model"] = 9.0 if whole else bits
            found["positions" if whole else "sources"] = {
                "64" if whole else "code": {"tokens": 7, "bits_per_byte": 0.9}
            }
            Path(said["output"]).write_text(json.dumps(found))
        else:
            with Path(said["benchmark.output"]).open("a") as file:
                command = f"python -m {module} {' '.join(words)}"
                file.write(json.dumps({"name": "training loop", "model": said["model"], "command": command}) + "\n")

    monkeypatch.setattr(Programs, "run", run)
    return calls


def command(place: Path, *words: str) -> list[str]:
    places = {"--plan": "plan.yaml", "--data": "data", "--output": "rows.jsonl", "--runs": "runs"}
    return [word for key, name in places.items() for word in (key, str(place / name))] + list(words)


def rows(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]


def test_a_plan_is_run_once_and_the_best_rate_is_read_from_its_rows(place, programs):
    assert main(command(place, "--pieces", "rates", "--at-once", "4", "--gpus", "0", "1", "--", "seed=0")) == 0
    assert len(rows(place)) == 6
    assert {row["at_once"] for row in rows(place)} == {2}
    assert {said["gpu"] for _, said in programs} == {"0", "1"}
    assert all(said["experiment"] == "results" for module, said in programs if module == "megatron_tn.train")
    programs.clear()
    assert main(command(place, "--pieces", "rates", "seeds", "again")) == 0
    trained = [(said["optim.lr"], said["seed"]) for module, said in programs if module == "megatron_tn.train"]
    assert trained == [("0.002", "1"), ("0.002", "2"), ("0.002", "3")]  # seed 0 has a row; seed 3 is in two grids
    last = rows(place)[-2]
    assert (last["model"], last["value"], last["whole"], last["curve"]) == ("ours", 1.22, 9.0, "2.000:1.5000")
    assert (last["sources/code"], last["positions/64"]) == (0.9, 0.9)
    assert (last["long"], last["long/64"]) == (9.0, 0.9)
    assert {said["sequence_tokens"] for _, said in programs if said.get("output", "").endswith("long.json")} == {"9"}
    for again in ([], ["--", "experiment=results"]):  # which the plan says, too
        assert main(command(place, *again)) == 0
    assert [said["model"] for module, said in programs if module == "megatron_tn.benchmark"] == ["ours", "rival"]


def test_the_last_evaluation_of_the_training_is_enough_where_the_plan_says_so(place, programs):
    (place / "plan.yaml").write_text("held_out: curve" + PLAN)
    assert main(command(place, "--pieces", "rates", "--documents", "5", "--", "seed=0")) == 0
    assert {said.get("evaluation.max_documents", said.get("max_documents")) for _, said in programs} == {"5"}
    outputs = {Path(said["output"]).name for module, said in programs if module == "megatron_tn.evaluate"}
    assert outputs == {"long.json"}  # the plan's own
    assert {(row["value"], row["long"], row.get("whole")) for row in rows(place)} == {(1.5, 9.0, None)}


def test_a_run_that_diverged_has_a_row(place, programs, monkeypatch, capsys):
    """Its journal has null for what is not finite."""
    pieces = "pieces: {one: [{model: [ours], optim.lr: [1.0e-3], seed: [0]}]}"
    (place / "plan.yaml").write_text(f"held_out: curve\nsettings: {{data.filter: null}}\n{pieces}")
    monkeypatch.setattr("launch.results.__main__.REPORT_S", 0.01)
    run = Programs.run

    def diverged(self, module, words, log, gpu=None):
        run(self, module, words, log, gpu)
        journal = log.with_name("log.jsonl")
        journal.write_text(journal.read_text().replace("3.0", "null").replace("1.5", "null"))
        until = time.monotonic() + 10
        while "step 2, loss not finite" not in capsys.readouterr().out:
            assert time.monotonic() < until
            time.sleep(0.01)

    monkeypatch.setattr(Programs, "run", diverged)
    assert main(command(place)) == 0
    assert (rows(place)[0]["value"], rows(place)[0]["curve"]) == (math.inf, "2.000:inf")
    assert programs[0][1]["data.filter"] == "null"


@pytest.mark.parametrize("held_out", ["evaluate", "curve"])
def test_a_run_that_was_stopped_within_its_last_evaluation(place, programs, monkeypatch, held_out):
    """Its curve ends before the training does: the last value of it is no figure of the run, which is evaluated."""
    (place / "plan.yaml").write_text(f"held_out: {held_out}" + PLAN)
    run = Programs.run

    def stopped(self, module, words, log, gpu=None):
        run(self, module, words, log, gpu)
        if module == "megatron_tn.train":
            journal = log.with_name("log.jsonl")
            records = [json.loads(line) for line in journal.read_text().splitlines()]
            records[-1:] = [
                {"step": 1, "heldout_loss": 4.0, "heldout_bits_per_byte": 2.5},
                {"step": 2, "evaluation_s": 1},
            ]
            journal.write_text("".join(json.dumps(record) + "\n" for record in records))

    monkeypatch.setattr(Programs, "run", stopped)
    assert main(command(place, "--pieces", "rates")) == 0
    curve = "1.000:2.5000" if held_out == "evaluate" else "1.000:2.5000 2.000:1.4000"
    assert (rows(place)[0]["value"], rows(place)[0]["curve"]) == (1.4, curve)
    (said,) = (
        s for _, s in programs if s.get("output", "").endswith("lr=0.001,seed=0/pieces.json") and "ours" in s["output"]
    )
    assert said.get("max_documents") == (None if held_out == "evaluate" else "256")  # as the training's evaluations


def test_the_runs_that_do_not_fail_go_on(place, programs, monkeypatch, capsys):
    """Pieces that read the best of other runs wait, until they are asked for."""
    run = Programs.run

    def fails(self, module, words, log, gpu=None):
        if "model=ours" in words:
            raise Failed(f"{module}: the end of {log}")
        run(self, module, words, log, gpu)

    monkeypatch.setattr(Programs, "run", fails)
    assert main(command(place)) == 1
    assert {row["model"] for row in rows(place)} == {"rival"}
    assert len(rows(place)) == 4
    said = capsys.readouterr().out
    assert "ours,optim.lr=0.001,seed=0: failed: megatron_tn.train: the end of " in said
    failed = [f"ours,optim.lr={lr},seed=0" for lr in (0.001, 0.002, 0.004)]
    waiting = [f"piece {piece}: not begun, since it reads the best of other runs" for piece in ("seeds", "again")]
    assert said.split("failed:\n")[1].splitlines() == [
        f"  {line}" for line in (*failed, "ours,benchmark.loop_steps=20", *waiting)
    ]


def test_a_run_that_was_told_to_stop_has_no_row_and_goes_on_as_it_was_begun(place, programs, monkeypatch, capsys):
    """The trainer saves and exits with 0, and the same command goes on."""
    run, states = Programs.run, ["preempted", "preempted", "finished"]

    def stopped(self, module, words, log, gpu=None):
        run(self, module, words, log, gpu)
        if module == "megatron_tn.train":
            log.with_name("status.json").write_text(json.dumps({"state": states.pop(0), "step": 2}))

    monkeypatch.setattr(Programs, "run", stopped)
    (place / "plan.yaml").write_text("pieces: {one: [{model: [ours], optim.lr: [1.0e-3], seed: [0]}]}")
    assert main(command(place, "--", "schedule.steps=9", "seed=0")) == 1  # a seed that the plan says, too
    assert main(command(place, "--", "schedule.steps=7")) == 1  # it has no checkpoint, and begins anew
    assert not (place / "rows.jsonl").exists()
    (run_dir,) = {Path(said["run_dir"]) for _, said in programs}
    checkpoint = run_dir / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    programs.clear()
    with pytest.raises(SystemExit) as refused:
        main(command(place, "--", "schedule.steps=8"))
    assert refused.value.code == 2
    line = f"{run_dir} was begun with other settings (schedule.steps: '7' -> '8'): give those, or move the folder away"
    assert line in capsys.readouterr().err
    assert programs == []
    assert main(command(place, "--", "seed=0", "schedule.steps=7")) == 0
    assert len(rows(place)) == 1


def test_runs_of_one_name_are_apart_by_plan_and_each_plan_is_run_once_at_a_time(place, programs, capsys):
    (place / "other.yaml").write_text(PLAN)
    assert main(command(place, "--pieces", "rates")) == 0
    assert main(command(place, "--pieces", "rates", "--plan", str(place / "other.yaml"))) == 0
    folders = [said["run_dir"] for module, said in programs if module == "megatron_tn.train"]
    assert len(set(folders)) == len(folders) == 12
    if not (other := os.fork()):  # locks are those of a process
        RunFolder(place / "runs" / "other").claim()
        os.kill(os.getpid(), signal.SIGSTOP)
    os.waitpid(other, os.WUNTRACED)
    try:
        with pytest.raises(SystemExit):
            main(command(place, "--plan", str(place / "other.yaml")))
        assert f"process {other}) runs other there" in capsys.readouterr().err
        assert main(command(place, "--pieces", "rates")) == 0
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def test_pieces_share_the_gpus_unless_one_reads_the_rows_of_another():
    pieces = {
        "rates": [{"optim.lr": [0.1, 0.2]}],
        "more": [{"optim.lr": [0.3]}],
        "seeds": [{"optim.lr": ["best of 50m"], "seed": [1]}],
        "other": [{"optim.lr": [0.4]}],
        "speed": [{"optim.lr": [0.1]}, {"benchmark.loop_steps": [20]}],
        "last": [{"optim.lr": [0.5]}],
    }
    assert stages([*pieces], {"pieces": pieces}) == [["rates", "more"], ["seeds", "other", "speed"], ["last"]]
    assert stages(["last", "rates"], {"pieces": pieces}) == [["last", "rates"]]


def test_the_best_rate_is_that_of_the_variant():
    rows = [{"name": "result", "model": "ours", "lr": lr, "value": bits} for lr, bits in ((1e-3, 1.2), (2e-3, 1.3))]
    rows += [row | {"variant": "muon", "value": 3 - row["value"]} for row in rows]
    rows.append(rows[0] | {"variant": "fp8", "value": math.inf})
    for asked, lr in (("best of ours", 1e-3), ("best of ours muon", 2e-3)):
        assert [*grid_runs({"optim.lr": [asked]}, rows)] == [{"optim.lr": lr}]
    with pytest.raises(Bad, match="no run of ours fp8 that did not diverge has a row yet"):
        [*grid_runs({"optim.lr": ["best of ours fp8"]}, rows)]


def test_a_run_that_cannot_end_in_time_does_not_begin(place, programs, capsys, monkeypatch):
    """By what one like it took; the same command goes on, and repeats nothing."""
    took = {"name": "result", "plan": "plan", "at_once": 1, "gpu": None, "model": "ours", "variant": "", "value": 1.4}
    took |= {"run": "ours,optim.lr=0.001,seed=0", "lr": 0.001}
    for row in (took | {"gpu": "A100", "seconds": 1}, took | {"tokens": 6_000, "tokens_per_second": 60}):
        with (place / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(Programs, "left", lambda self: 60.0)
    assert main(command(place, "--minutes", "2", "--pieces", "rates", "seeds")) == 3
    assert {said["model"] for module, said in programs if module == "megatron_tn.train"} == {"rival"}  # none like it
    said = capsys.readouterr().out
    assert "ours,optim.lr=0.002,seed=0: does not begin: about 100 s, and 60 s are left" in said
    assert "Left:\n  ours,optim.lr=0.002,seed=0\n  ours,optim.lr=0.004,seed=0\n  piece seeds\n" in said
    programs.clear()
    assert main(command(place, "--minutes", "1", "--pieces", "rates")) == 0  # a run is longer than any such call
    trained = [(said["model"], said["optim.lr"]) for module, said in programs if module == "megatron_tn.train"]
    assert trained == [("ours", "0.002"), ("ours", "0.004")]
    assert rows(place)[-1]["seconds"] < 60


def test_the_time_of_a_run_is_what_its_checkpoint_leaves(tmp_path):
    run = Run("plan", {}, {"model": "ours", "optim.lr": 0.1, "seed": 3}, tmp_path, {})
    known = [
        {"name": "result", "plan": "plan", "at_once": 2, "gpu": None, "run": "ours,optim.lr=1,seed=0", "seconds": 8}
    ]
    assert (run.seconds_left(known, 1), run.seconds_left(known, 2)) == (None, 8)
    checkpoint = run.folder.checkpoints / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    save(TrainConfig(schedule=ScheduleConfig(steps=4)), run.folder.config_file)
    assert run.seconds_left(known, 2) == 2


BAD_PLANS = {
    "{pieces: {rates: [{model: ours}]}}": "pieces.rates[0].model: 'ours' must be a list of values",
    "{pieces: {rates: [{model: []}]}}": "pieces.rates[0].model: [] must be a list of values",
    "{pieces: {rates: {model: [ours]}}}": "pieces.rates: {'model': ['ours']} must be a list of grids",
    "{pieces: {rates: [{optim.rate: [1]}]}}": "pieces.rates[0]: unknown setting optim.rate; did you mean",
    "{pieces: {rates: [{run_dir: [a]}]}}": "pieces.rates[0].run_dir: --runs says it",
    "{pieces: [rates]}": "pieces: ['rates'] must be a mapping of names",
    "{settings: {model: 50m}}": "pieces is missing: a plan has settings, pieces, evaluations, held_out",
    "{pieces: {}, setting: {}}": "unknown key setting: a plan has settings, pieces, evaluations, held_out",
    "{pieces: {}, settings: 5}": "settings: 5 must be a mapping of names",
    "{pieces: {}, settings: {seeed: 1}}": "settings: unknown setting seeed; did you mean seed?",
    "{pieces: {}, held_out: curves}": "held_out: curves must be one of evaluate, curve",
    "{pieces: {}, evaluations: {long: {split: held}}}": "evaluations.long.split: held must be one of train, heldout, p",
    "{pieces: {}, evaluations: {long: {}}}": "evaluations.long.split: None must be one of train, heldout, pieces",
    "{pieces: {}, evaluations: {long: {split: train, batch: 1}}}": "evaluations.long: unknown setting batch; did you",
    "[pieces]": "it holds ['pieces'], not keys and values: a plan has settings, pieces, evaluations, held_out",
    "": "it holds None, not keys and values",
    "{pieces: {a: [], a: []}}": "a is there twice in one mapping, at line 1",
    "{pieces: {a: [{seed: [0], seed: [1]}]}}": "seed is there twice in one mapping, at line 1",
    "{": "no plan: while parsing",
}


def test_bad_input_is_said_before_anything_runs(place, programs, capsys):
    (place / "no settings.yaml").write_text("pieces: {rates: [{model: [ours], optim.lr: [1.0e-3], seed: [0]}]}")
    assert read_plan(place / "no settings.yaml")["settings"] == {}
    for index, text in enumerate(BAD_PLANS):
        (place / f"{index}.yaml").write_text(text)
    plans = [
        (command(place, "--plan", str(place / f"{n}.yaml")), f"{n}.yaml: {BAD_PLANS[t]}")
        for n, t in enumerate(BAD_PLANS)
    ]
    (place / "torn.jsonl").write_text('{"name": "result", "plan')
    (place / "number.jsonl").write_text("5\n")
    (place / "other.jsonl").write_text('{"name": "result", "model": "ours"}\n')
    (place / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    typed = {"name": "result", "plan": "plan", "run": "ours", "model": "ours", "lr": 0.1, "value": "1.4"}
    (place / "typed.jsonl").write_text(json.dumps(typed))
    no_rows = (
        *(("number.jsonl", "'int' object"), ("other.jsonl", "plan is missing"), ("bytes.jsonl", "Expecting value")),
        ("typed.jsonl", "value='1.4' must be a number"),
    )
    for words, line in (
        *plans,
        (command(place, "--pieces", "rate"), "--pieces rate: "),
        (command(place, "--pieces", "rate"), "has rates, seeds, again, speed"),
        (command(place, "--pieces", "speed", "seeds"), "optim.lr=best of ours: no run of ours has a row yet"),
        (command(place, "--plan", str(place / "none.yaml")), "none.yaml: no plan: [Errno 2] No such file"),
        (command(place, "--data", str(place)), "/train/manifest.json; python -m data_pipeline.corpus.join makes it"),
        (command(place, "--at-once", "0"), "--at-once 0 must be at least 1"),
        (command(place, "--minutes", "nan"), "--minutes nan must be at least 0"),
        (command(place, "--documents", "-1"), "--documents -1 must be at least 0"),
        (
            command(place, "--output", "/dev/null"),
            "--output /dev/null is not a regular file: rows are read from it, too",
        ),
        (command(place, "--", "+run_dir=elsewhere"), "+run_dir=elsewhere: --runs says it; leave it out"),
        (command(place, "--output", str(place)), f"--output={place} is a folder: name a file"),
        (command(place, "--output", str(place / "torn.jsonl")), "torn.jsonl: line 1 is no row (Unterminated string"),
        *((command(place, "--output", str(place / name)), f"{name}: line 1 is no row ({why}") for name, why in no_rows),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert line in capsys.readouterr().err
    assert programs == []


@pytest.mark.parametrize("path", sorted(Path("launch/plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_runs_of_every_plan_are_there(path, tmp_path):
    plan = read_plan(path)
    model = path.stem.rpartition("_")[2].replace("time", "50m")
    known = [{"name": "result", "model": model, "lr": 0.001, "value": 1.0}]
    known += [known[0] | {"model": f"transformer_{model}"}]
    assert megatron_tn.benchmark.main  # importing it registers the schema
    chosen = []
    for grid in itertools.chain(*plan["pieces"].values()):
        runs = [Run(path.stem, plan["settings"], own, tmp_path, {}) for own in grid_runs(grid, known)]
        known += [known[0] | {"model": run.own.get("model"), "variant": run.variant} for run in runs]
        chosen += [run.own for run in runs]
    assert len({tuple(own.items()) for own in chosen}) == len(chosen) > 0
    for group in ("model", "experiment"):  # test_config.py composes each of these files
        assert {own[group] for own in chosen if group in own} <= names_in(cli.CONF / group)
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        for own in {tuple(own): own for own in chosen}.values():  # one of each form
            words = [f"{key}={value}" for key, value in (plan["settings"] | own).items()]
            name, kind = ("config", TrainConfig) if "seed" in own else ("benchmark", BenchmarkConfig)
            config = OmegaConf.to_container(hydra.compose(name, words), resolve=True)
            assert from_mapping(kind, config).problems(world_size=1) == []


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
