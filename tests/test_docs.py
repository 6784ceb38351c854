"""Examples in README and docs can be pasted: shell and Python parse, imports exist, settings are settings."""

import importlib
import importlib.util
import itertools
import re
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import pytest

from data_pipeline.ablation.settings import AblationSettings
from data_pipeline.audit.settings import AuditSettings
from data_pipeline.config import compose as compose_pipeline
from data_pipeline.config import compose_settings
from data_pipeline.selfclean.settings import RoundsSettings
from launch import submit
from megatron_tn import benchmark, convert, evaluate, generate, plan, score, train
from megatron_tn.benchmarking import block, share
from megatron_tn.cli.override_check import check_overrides
from megatron_tn.cli.overrides import CommandLine
from megatron_tn.config import (
    BenchmarkConfig,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    ScoreConfig,
    TrainConfig,
    known_keys,
)
from megatron_tn.config.slurm import SubmitConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HERE_DOCUMENT = re.compile(r"^(.*) - <<'END'\n(.*?)^END$", re.DOTALL | re.MULTILINE)
TRAINERS = {  # module -> (settings, file of conf/); importing a module registers its schema
    train: (TrainConfig, "config"),
    plan: (PlanConfig, "plan"),
    **dict.fromkeys((benchmark, block, share), (BenchmarkConfig, "benchmark")),
    convert: (ConvertConfig, "convert"),
    evaluate: (EvaluateConfig, "evaluate"),
    generate: (GenerateConfig, "generate"),
    score: (ScoreConfig, "score"),
    submit: (SubmitConfig, "submit"),
}
CLEANERS = {
    "run": compose_pipeline,
    "canaries": compose_pipeline,
    "selfclean": partial(compose_settings, "rounds", cls=RoundsSettings),
    "audit": partial(compose_settings, "audit", cls=AuditSettings),
    "ablation": partial(compose_settings, "ablation", cls=AblationSettings),
}
FIRST_WORDS = {*get_args(get_type_hints(ConvertConfig)["action"]), "draw", "summary", "judge"}


class Example(NamedTuple):
    place: str
    language: str  # "" for a shell
    text: str


def examples() -> list[Example]:
    return [
        Example(f"{page.name}:{text.count(chr(10), 0, found.start()) + 1}", found[1], found[2])
        for page in PAGES
        for text in [page.read_text()]
        for found in FENCE.finditer(text)
    ]


def commands(shell: str) -> list[list[str]]:
    """The words of each command, without comments and redirections."""
    lines = shell.replace("\\\n", "").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[: words.index(">")] if ">" in words else words for words in found if words]


def program(words: list[str]) -> tuple[str, list[str]]:
    """(Module, its arguments) of a command; the module is empty for a command that is not the project's."""
    words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words))  # variables of its environment
    if words[0].endswith(("python", "torchrun")) and "-m" in words:
        module = words.index("-m") + 1
        return words[module], words[module + 1 :]
    launcher = next((number for number, word in enumerate(words) if word.startswith("launch/")), None)
    if launcher is None:
        return "", []
    assert (ROOT / words[launcher]).is_file(), words
    arguments = words[launcher + 1 :]
    arguments = arguments[2:] if arguments[0] == "-n" else arguments
    return "data_pipeline.run" if words[launcher] == "launch/pipeline.sbatch" else "megatron_tn.train", arguments


def check(module: str, arguments: list[str]) -> None:
    """Raises an error that names the setting."""
    assert importlib.util.find_spec(module), module
    assert not [word for word in arguments if word.startswith(("launch/", "conf/")) and not (ROOT / word).is_file()]
    package, _, name = module.partition(".")
    arguments = arguments[arguments[0] in FIRST_WORDS :]
    if module == "launch.compare_losses":
        package, name, arguments = "megatron_tn", "train", arguments[arguments.index("--") + 1 :]
    # The launchers of the extra submitit, which the tests do without.
    arguments = [word for word in arguments if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    if package in ("megatron_tn", "launch") and (found := TRAINERS.get(importlib.import_module(module))):
        check_overrides(CommandLine.parse(*found, arguments))
    elif package == "data_pipeline" and name in CLEANERS:
        CLEANERS[name]([word for word in arguments if not word.startswith("per_kind=")])


PYTHON = [Example(e.place, "python", body) for e in examples() for _, body in HERE_DOCUMENT.findall(e.text)]
PYTHON += [example for example in examples() if example.language == "python"]
SHELL = [e._replace(text=HERE_DOCUMENT.sub("", e.text)) for e in examples() if not e.language]


def test_every_page_with_commands_is_read():
    assert {example.place.partition(":")[0] for example in SHELL} >= {"README.md", "quickstart.md", "data.md"}


@pytest.mark.parametrize("example", PYTHON, ids=lambda example: example.place)
def test_python_compiles_and_its_imports_exist(example):
    compile(example.text, example.place, "exec")
    imports = [line for line in example.text.splitlines() if line.startswith(("import ", "from "))]
    assert imports
    exec("\n".join(imports), {})


@pytest.mark.parametrize("example", SHELL, ids=lambda example: example.place)
def test_a_command_can_be_pasted_and_has_settings_that_exist(example):
    for words in commands(example.text):
        assert not [word for word in words if "..." in word], words  # a place for the reader to fill in
        module, arguments = program(words)
        if module:
            check(module, arguments)


SETTINGS = {key for kind, _ in TRAINERS.values() for key in known_keys(kind)}
NAMED = re.compile(r"`\+?([a-z_0-9]+\.[a-z_0-9.]+)(?:=[^`]*)?`")  # `optim.lr` or `optim.lr=1e-3`


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_prose_names_exists(page):
    """Programs, and settings of the groups that training and the other commands have."""
    text = page.read_text()
    modules = set(re.findall(r"-m ((?:megatron_tn|launch|data_pipeline|kernels)[\w.]*)", text))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]
    names = {
        name.rstrip(".") for name in NAMED.findall(FENCE.sub("", text)) if not name.endswith((".json", ".safetensors"))
    }
    groups = {key.partition(".")[0] for key in SETTINGS if "." in key} - {"slurm"}  # which the pipeline has, too
    below = tuple(f"{key}." for key in ("data.mixture", "engine.deepspeed_config"))  # whose keys are the user's
    of_groups = {name for name in names if name.partition(".")[0] in groups and not name.startswith(below)}
    assert not {name for name in of_groups if not any(f"{key}.".startswith(f"{name}.") for key in SETTINGS)}
