"""What the command lines have in common: help, and errors as lines and an exit code."""

import errno
import importlib
import subprocess
import sys

import pytest

from data_pipeline.ablation.settings import AblationSettings
from data_pipeline.audit.settings import AuditSettings
from data_pipeline.cli import command, overrides
from data_pipeline.config import Settings, compose, compose_settings, known_keys
from data_pipeline.corpus.settings import CorpusSettings
from data_pipeline.errors import InputError, StageError
from data_pipeline.selfclean.settings import RoundsSettings
from tests.data_pipeline.test_pipeline import ROOT

MODULES = ("run", "canaries", "selfclean", "ablation", "audit", "stream.count", "stream.bench", "shards.verify")


@pytest.mark.parametrize("module", MODULES)
def test_help_is_the_module_s_own_text(module, capsys):
    package = f"data_pipeline.{module}"
    inner = "__main__" if module in ("selfclean", "ablation", "audit") else ""
    found = importlib.import_module(f"{package}.{inner}".rstrip("."))
    with pytest.raises(SystemExit, match="0"):
        found.main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m {package} ")
    assert found.__doc__.strip() in shown


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (InputError("a=1: wrong", "b=2: wrong"), 2, "a=1: wrong\nb=2: wrong\n"),
        (StageError("stage rules, task 3: no room"), 1, "stage rules, task 3: no room\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "counts"),
            1,
            "[Errno 28] No space left on device: 'counts': make room and run the same command again\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again\n"),
    ],
    ids=["input", "stage", "full disk", "interrupt"],
)
def test_an_error_is_lines_and_an_exit_code(error, code, shown, capsys):
    @command
    def main(arguments):
        raise error

    assert main(["x"]) == code
    assert capsys.readouterr() == ("", shown)


def test_another_error_is_no_bad_input_and_keeps_its_traceback():
    @command
    def main(arguments):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        main([])


def test_what_main_returns_is_the_exit_code_and_nothing_is_0():
    assert command(lambda arguments: len(arguments))(["a", "b", "c"]) == 3
    assert command(lambda arguments: None)([]) == 0


def test_the_process_s_own_arguments_and_exit_code_are_used():
    words = [sys.executable, "-m", "data_pipeline.shards.verify", "/no/such/manifest.json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("manifest=/no/such/manifest.json: ")
    assert len(done.stderr.splitlines()) == 1


def test_paths_are_taken_as_they_are_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = compose(["pipeline=jsonl", "input=~/raw text", "output=20250101", "tokenizer.file=a=b", "slurm.time=30"])
    assert (settings.input, settings.sources["main"].path) == (f"{tmp_path}/raw text", f"{tmp_path}/raw text")
    assert (settings.output, settings.tokenizer.file, settings.slurm.time) == ("20250101", "a=b", 30)
    settings = compose(["output=x", "sources.stdlib.path=[1]", "language={min_confidence: 0.5}"])
    assert (settings.sources["stdlib"].path, settings.language.min_confidence) == ("[1]", 0.5)
    assert compose_settings("ablation", ["output=1e3", "packages=[rich]"], AblationSettings).output == "1e3"


@pytest.mark.parametrize("kind", [Settings, RoundsSettings, AuditSettings, CorpusSettings, AblationSettings])
def test_help_lists_every_setting_with_its_default(kind, capsys):
    with pytest.raises(SystemExit, match="0"):
        overrides("data_pipeline.run", "About.", ["--help"], kind)
    said = capsys.readouterr().out
    names = {line.strip().partition("=")[0] for line in said.splitlines() if line.startswith("    ")}
    groups = {f"{line.partition(' of ')[0].rstrip(':')}" for line in said.splitlines() if line.endswith(":")}
    assert set(known_keys(kind)) <= names | groups | {group.removesuffix(".NAME") for group in groups}
    if kind is Settings:
        assert "    tokenizer.vocab_size=64000\n" in said
        assert "    sources.NAME.text_key=text\n" in said
        assert said.count("    sources.NAME.priority=0\n") == 1
