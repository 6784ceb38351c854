"""Words of a command line: taken as they are typed, in one order of precedence, and refused in one line each."""

import logging
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from data_pipeline.words import as_typed, quoted
from megatron_tn.cli import command
from megatron_tn.cli.override_check import check_overrides
from megatron_tn.cli.overrides import CommandLine, settings
from megatron_tn.cli.sweep_folder import job_folder
from megatron_tn.config import ConfigError, GenerateConfig, TrainConfig, from_mapping
from tests.helpers.training import call

seen: list[TrainConfig] = []
main = command(TrainConfig, "config")(seen.append)  # a command line that notes what it was called with


@pytest.fixture(autouse=True)
def _nothing_seen(monkeypatch):
    seen.clear()
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


def parsed(*words: str) -> TrainConfig:
    line = CommandLine.parse(TrainConfig, "config", words)
    check_overrides(line)
    return from_mapping(TrainConfig, settings(line.composed))


KINDS = {"run_dir": (str,), "checkpoint.resume": (int, str), "logging.wandb.entity": (str, type(None))}
PATHS = ["1e3", "true", "a=b", "my [first] run", "{x}", "résumé/日本", "it's", 'a "b"', "back\\slash", "[a,b]", "12_3"]


def takes(key: str) -> tuple[type, ...]:
    return KINDS.get(key, ())


def test_a_path_is_taken_as_it_is_typed():
    config = parsed("run_dir=20250101", "data.manifest=a=b")
    assert (config.run_dir, config.data.manifest) == ("20250101", "a=b")
    for path in PATHS:
        for key in ("run_dir", "checkpoint.resume"):
            for multirun in (False, True):
                word = as_typed(f"{key}={path}", takes, multirun=multirun)
                assert OverridesParser.create().parse_override(word).value() == path
    for word in ("checkpoint.resume=20250101", "logging.wandb.entity=null", "seed=3", "run_dir=a,b", "model=1b"):
        assert as_typed(word, takes, multirun=True) == word


@pytest.mark.parametrize("text", ["a'b", "a\\", "a\\'b", "\\\\", " lead ", "null", ""])
def test_quotes_hold_any_text(text):
    assert OverridesParser.create().parse_override(f"k={quoted(text)}").value() == text


def test_a_home_folder_is_expanded_wherever_a_shell_left_it_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "deepspeed.json").write_text('{"steps_per_print": 7}')
    config = parsed("run_dir=~/runs/x", "data.manifest='~/m.json'", "engine.deepspeed_config=~/deepspeed.json")
    assert (config.run_dir, config.data.manifest) == (f"{tmp_path}/runs/x", f"{tmp_path}/m.json")
    assert config.engine.deepspeed_config == {"steps_per_print": 7}
    monkeypatch.chdir(tmp_path)
    assert call(main, "--multirun", "run_dir=~/sweep", "seed=1,2", "model=demo") == 0
    assert [found.run_dir for found in seen] == [f"{tmp_path}/sweep/0_seed-1", f"{tmp_path}/sweep/1_seed-2"]
    assert not (tmp_path / "~").exists()
    with pytest.raises(ConfigError, match="run_dir=~nobody-at-all/x: there is no user 'nobody-at-all'"):
        parsed("run_dir=~nobody-at-all/x")


def test_free_text_of_another_command_keeps_its_tilde(capsys):
    asked = []
    assert call(command(GenerateConfig, "generate", literal=("prompt",))(asked.append), "prompt=~ a, b = [c]") == 0
    assert asked[0].prompt == "~ a, b = [c]"


def test_the_command_line_wins_over_an_experiments_file():
    experiment = parsed("experiment=demo")
    assert (experiment.data.sequence_length, experiment.parallel.tp) == (256, 2)
    config = parsed("experiment=demo", "data=8k", "parallel=single", "engine=local")
    assert (config.data.sequence_length, config.parallel.tp, config.engine.name) == (8192, 1, "local")
    assert (config.data.global_batch, config.engine.precision) == (8, "bf16")  # what the files chosen do not say
    assert parsed("data.sequence_length=64", "experiment=demo", "data=8k").data.sequence_length == 64


def test_every_job_of_a_sweep_has_its_own_choice_and_is_listed_by_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words = ("experiment=demo", "data=2k,8k", f"run_dir={tmp_path}", "-m", "model=demo", "model.decay=none,paper")
    assert call(main, *words) == 0
    named = [f"data={data} model.decay={decay}" for data in ("2k", "8k") for decay in ("none", "paper")]
    assert [line.partition(" : ")[2] for line in caplog.messages if " : " in line] == named
    del seen[1::2]
    assert list(tmp_path.iterdir()) == []  # a job makes its folder itself, once it is not refused
    assert [config.data.sequence_length for config in seen] == [2048, 8192]
    folders = ["0_data-2k_model.decay-none", "2_data-8k_model.decay-none"]
    assert [Path(config.run_dir).name for config in seen] == folders


def test_a_command_that_asks_nothing_of_hydra_has_the_config_that_hydra_composes():
    words = ("experiment=demo", "data=8k", "optim.lr=1e-2", "run_dir=~/runs")
    for more in ([], ["hydra.job.name=mine"], ["hydra.job.name=mine", "data.manifest=${hydra:job.name}"]):
        assert call(main, *words, *more) == 0
    plain, by_hydra, with_a_value_of_hydras = seen
    assert plain == by_hydra
    assert with_a_value_of_hydras.data.manifest == "mine"


def test_a_folder_of_experiments_stands_for_its_files_in_a_sweep(tmp_path, capsys):
    assert call(main, "--multirun", "experiment=paper/norm,paper/gate", f"run_dir={tmp_path}") == 0
    rows = [("layernorm", True), ("simplermsnorm", True), ("rmsnorm", True), ("simplermsnorm", False)]
    assert [(config.model.norm, config.model.gate) for config in seen] == rows
    assert Path(seen[0].run_dir).name.startswith("0_experiment-paper-norm-layernorm")
    assert len({config.run_dir for config in seen}) == len(seen)
    assert call(main, "experiment=paper/norm") == 2
    assert "conf/experiment/paper/norm is a folder of 3 files: name one, such as" in capsys.readouterr().err


def test_flags_are_as_hydra_spells_them(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/short.yaml").write_text("sequence_length: 16\n")
    for words in (["--cfg", "job"], ["-c", "job"]):
        assert call(main, "experiment=demo", *words, "data=short", "--config-dir", str(tmp_path)) == 0
        assert "sequence_length: 16\n" in capsys.readouterr().out
    assert seen == []
    assert call(main, "--config-dir", str(tmp_path), "data=shorter") == 2
    assert "data=shorter: conf/data has 2k, 8k, short; did you mean short?" in capsys.readouterr().err
    for flag, reason in (("--config-dir", "there is no such folder"), ("--config-path", "the settings are composed")):
        assert call(main, flag, f"{tmp_path}/none") == 2
        assert capsys.readouterr().err.startswith(f"error: {flag} {tmp_path}/none: {reason}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+data.mixture.epochs.wiki=2", "lr=3"], ["unknown setting lr; did you mean optim.lr?"]),
        (["lr=3", "data.mixture.epochs.a=2"], ["unknown setting lr; did you mean optim.lr?"]),
        (
            ["data.mixture={epochs: {a: 2}}", "engine.deepspeed_config.steps=7"],
            [
                "data.mixture={epochs: {a: 2}}: a new key of data.mixture needs a + in front: +data.mixture={epochs: "
                "{a: 2}}",
                "engine.deepspeed_config.steps=7: a new key of engine.deepspeed_config needs a + in front: "
                "+engine.deepspeed_config.steps=7",
            ],
        ),
    ],
    ids=["with a +", "beside an unknown setting", "without"],
)
def test_a_key_that_is_the_user_s_own_needs_a_plus(words, said, capsys):
    assert call(main, *words) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in said]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.lr=interval(0,1)"], ["optim.lr=interval(0,1): an interval has no list of values"]),
        (["seed=range(1,1)", "model=glob(z*)"], ["seed=range(1,1): there is no value", "model=glob(z*): there is no"]),
        (["model=glob(1*b)", "model.layers=0"], ["model.layers=0 must be from 1 to 2048"]),
        (["seed=choice()"], ["not an override: 'seed=choice()'"]),
        (["optim.lr=1e-3,-1"], ["optim.lr=-1.0 must be above 0"]),
        (
            ["experiment=paper/architecture/hybrid,paper/gate/without,paper/architecture/transformer", "model=demo"],
            ["experiment=paper/architecture/transformer has the settings of experiment=paper/architecture/hybrid: "],
        ),
        (["seed=0,0.0", "model.decay=paper"], ["seed=0.0 has the settings of seed=0: "]),
        (
            ["model=1b,7b,1b", "seed=choice(0,1,1,0)"],
            [
                "model=1b,7b,1b: two jobs would have model=1b: name it once",
                "seed=choice(0,1,1,0): two jobs would have seed=0: ",
                "seed=choice(0,1,1,0): two jobs would have seed=1: ",
            ],
        ),
    ],
    ids=["interval", "no values", "glob", "empty", "value", "same model", "same seed", "twice"],
)
def test_a_bad_sweep_is_a_line_each(capsys, words, said):
    assert call(main, "--multirun", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(f"error: {start}")
    assert seen == []


def folder(number: int, words: list[str], job: list[str], run_dir: str = "runs") -> str:
    return job_folder(run_dir, OmegaConf.create({"job": {"num": number}, "overrides": {"task": job}}), words)


def test_a_sweeps_folders_fit_differ_and_can_be_typed_again(tmp_path):
    assert folder(0, ["model.decay=none,paper", "seed=1"], ["model.decay=none", "seed=1"]) == "runs/0_model.decay-none"
    assert folder(1, ["+optim.lr=1e-3,1e-2"], ["+optim.lr=1e-3"]) == "runs/1_optim.lr-1e-3"
    long = [f"{tmp_path}/{letter * 120}/manifest.json" for letter in "ab"]
    swept = [f"data.manifest={','.join(long)}", f"evaluation.manifest={','.join(long)}", "data.filter='a,b','a/b'"]
    jobs = [
        [f"data.manifest={one}", f"evaluation.manifest={two}", f"data.filter={three}"]
        for one in long
        for two in long
        for three in ("'a,b'", "'a/b'")
    ]
    names = [folder(0, swept, job) for job in jobs]
    assert len(set(names)) == len(jobs)
    for name in names:
        assert len(Path(name).name.encode()) <= 200
        assert OverridesParser.create().parse_override(f"run_dir={name}").value() == name
        assert not set(name) & set("=,'\"[](){}:~ ")


def test_a_sweep_with_more_values_says_which_runs_it_repeats(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words, job = ["optim.lr=1,2", "seed=0,1,2"], ["optim.lr=2", "seed=0"]
    for name in ("2_optim.lr-2_seed-0", "x_3_optim.lr-2_seed-0", "2_optim.lr-2_seed-00"):
        (tmp_path / name).mkdir()
    assert folder(2, words, job, str(tmp_path)) == f"{tmp_path}/2_optim.lr-2_seed-0"
    assert caplog.text == ""
    assert folder(3, words, job, str(tmp_path)) == f"{tmp_path}/3_optim.lr-2_seed-0"
    assert f"{tmp_path}/3_optim.lr-2_seed-0 begins anew, beside {tmp_path}/2_optim.lr-2_seed-0 of the" in caplog.text
    caplog.clear()
    (tmp_path / "3_optim.lr-2_seed-0").mkdir()
    folder(3, words, job, str(tmp_path))
    assert caplog.text == ""


def test_a_sweep_that_was_begun_with_longer_names_goes_on_in_its_folders(tmp_path):
    (tmp_path / "0_model.decay=none").mkdir()
    found = folder(0, ["model.decay=none,paper"], ["model.decay=none"], str(tmp_path))
    assert found == f"{tmp_path}/0_model.decay=none"
