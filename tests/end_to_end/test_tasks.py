"""Tasks of lm-evaluation-harness on the command line and in training."""

import json
import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_tn.checkpoint.load import Reader
from megatron_tn.checkpoint.manifest import CheckpointManifest
from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.evaluate import show
from megatron_tn.released.write import save_pretrained
from megatron_tn.train import main as train
from megatron_tn.training.run_folder import RunFolder
from tests.helpers.models import TINY, reference_model
from tests.helpers.tasks import lm_eval, write_tasks
from tests.helpers.training import SMALL, call, fork_ranks, losses, records, train_forked

lm_eval()
TASKS = "[our_boolq,our_gsm8k,our_wikitext]"
FP32 = (*SMALL, "engine.precision=fp32", "schedule.steps=4", "evaluation.task_documents=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def scores_of(checkpoint: Path, folder: Path, output: Path, *more: str) -> dict[str, float]:
    """As a journal has them."""
    words = [f"checkpoint={checkpoint}", f"tasks={TASKS}", f"task_folder={folder}", f"output={output}", *more]
    assert call(evaluate, *words, "device=cpu", "task_documents=2") == 0
    return flat(json.loads(output.read_text())["tasks"])


def flat(tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    found = {f"tasks/{task}/{metric}": value for task, values in tasks.items() for metric, value in values.items()}
    return {name: value for name, value in found.items() if "_stderr" not in name and not name.endswith("/samples")}


def journal(run: Path) -> list[dict[str, float]]:
    found = records(run, "tasks/our_boolq/acc")
    return [{name: value for name, value in record.items() if name.startswith("tasks/")} for record in found]


def evaluate_on_a_rank(words: list[str]) -> None:
    sys.exit(call(evaluate, *words))


def test_in_training_from_a_checkpoint_split_in_two_and_from_an_export(shards, folder, tmp_path, capsys):
    """ZeRO 3 gathers parameters in the forward pass, so a rank without requests of its own runs padding."""
    run = tmp_path / "run"
    settings = (f"evaluation.tasks={TASKS}", f"evaluation.task_folder={folder}", "evaluation.every=2", "engine=zero3")
    train_forked(2, *FP32, *settings, f"data.manifest={shards}", f"run_dir={run}")
    halfway, at_end = journal(run)
    assert at_end != halfway
    assert at_end == pytest.approx(scores_of(run, folder, tmp_path / "one.json"), abs=1e-4, rel=1e-4)

    assert call(convert, "export", f"checkpoint={run}", f"output={tmp_path / 'export'}") == 0
    exported = scores_of(tmp_path / "export", folder, tmp_path / "exported.json")
    assert exported == pytest.approx(at_end, abs=1e-4, rel=1e-4)

    output = tmp_path / "two.json"
    words = [f"checkpoint={run}", f"tasks={TASKS}", f"task_folder={folder}", f"output={output}", "task_documents=2"]
    for process in fork_ranks(2, evaluate_on_a_rank, words):
        process.join(timeout=300)
        assert process.exitcode == 0
    found = json.loads(output.read_text())
    assert flat(found["tasks"]) == pytest.approx(at_end, abs=1e-4, rel=1e-4)
    capsys.readouterr()
    show(found)
    lines = [line.replace("│", "").split() for line in capsys.readouterr().out.splitlines()[3:-1]]
    assert [f"tasks/{task}/{metric}" for task, metric, *_ in lines] == list(at_end)
    task, metric, value, stderr, documents = next(line for line in lines if line[:2] == ["our_boolq", "acc"])
    scores = found["tasks"][task]
    assert (value, stderr) == (f"{scores[metric]:.4f}", f"{scores['acc_stderr']:.4f}")
    assert documents == "2"

    # A disk that is full when the figures are there; figures that JSON does not have.
    scores = {"own": {"acc": math.nan, "acc_stderr": math.inf, "samples": 2}}
    words = [f"checkpoint={run}", f"tasks={TASKS}", f"task_folder={folder}", "output=/dev/full"]
    with mock.patch("megatron_tn.evaluate.task_scores", return_value=scores):
        assert call(evaluate, *words) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: output=/dev/full cannot be written: No space left on device\n"
    assert "own" in printed.out.partition("{")[0]
    shown = json.loads(printed.out[printed.out.index("{") :], parse_constant=pytest.fail)
    assert shown == {"checkpoint": str(run), "tasks": {"own": {"acc": None, "acc_stderr": None, "samples": 2}}}
    # A metric that fails takes the held-out figures along no more.
    words = [f"checkpoint={run}", f"manifest={shards}", f"tasks={TASKS}", f"task_folder={folder}", "json=true"]
    with mock.patch("lm_eval.api.task.ConfigurableTask.process_results", side_effect=KeyError("odd")):
        assert call(evaluate, *words) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "error: task our_boolq cannot be scored: KeyError: 'odd'"
    assert {"nats_per_token", "tasks"} & json.loads(printed.out).keys() == {"nats_per_token"}


def test_evaluating_changes_neither_losses_nor_random_states_nor_the_data(shards, folder, tmp_path, caplog):
    words = (*FP32, "engine=fsdp2", f"data.manifest={shards}")
    tasks = (f"evaluation.tasks={TASKS}", f"evaluation.task_folder={folder}", "evaluation.every=1")
    tasks += ("logging.every=3",)  # steps that are evaluated have a record all the same
    assert call(train, *words, f"run_dir={tmp_path / 'without'}") == 0
    assert call(train, *words, *tasks, f"run_dir={tmp_path / 'with'}") == 0
    assert len(journal(tmp_path / "with")) == 4
    failing = mock.patch("lm_eval.api.task.ConfigurableTask.process_results", side_effect=KeyError("odd"))
    with failing, caplog.at_level("WARNING"):  # a metric's own fault
        assert call(train, *words, *tasks, f"run_dir={tmp_path / 'failing'}") == 0
    warning = "task our_boolq cannot be scored: KeyError: 'odd'; training goes on without this evaluation's scores"
    assert caplog.messages.count(warning) == 4
    for run in ("with", "failing"):
        assert losses(tmp_path / run) == losses(tmp_path / "without")
    states = []
    for name in ("with", "without"):
        checkpoint = RunFolder(tmp_path / name).whole_checkpoints()[-1]
        manifest = CheckpointManifest.read(checkpoint)
        with Reader(checkpoint, manifest) as reader:
            states.append((reader.rng(0)["rng/cpu"].tolist(), manifest.training["stream"]))
    assert states[0] == states[1]


def test_bad_tasks_before_anything_is_started(shards, folder, tmp_path, capsys):
    words = (f"data.manifest={shards}", f"run_dir={tmp_path / 'run'}", "evaluation.tasks=nowhere.yaml")
    assert call(train, *SMALL, *words, "model.heads=3") == 2
    said = capsys.readouterr().err
    assert "error: evaluation.tasks=nowhere.yaml: there is no such file" in said
    assert "model.heads=3" in said
    assert not (tmp_path / "run").exists()
    cosine = ("model=50m_cosformer", *SMALL[1:], "model.max_length=8", "evaluation.tasks=[our_gsm8k]")
    assert call(train, *cosine, *words[:2], f"evaluation.task_folder={folder}") == 2
    line = "error: evaluation.tasks: our_gsm8k generates max_gen_toks=12 > model.max_length=8 tokens\n"
    assert line in capsys.readouterr().err
    save_pretrained(reference_model(TINY, 1, torch.float32), tmp_path / "export")
    small = (f"checkpoint={tmp_path / 'export'}", f"tokenizer={shards.parent / 'tokenizer.json'}")
    assert call(evaluate, *small, f"task_folder={folder}", "tasks=[our_piqa]", "shots=6") == 2
    said = capsys.readouterr().err
    assert "error: tasks: our_piqa: shots=6 of its 5 documents cannot be examples: " in said
    assert f"error: {small[0]}: its tokenizer has " in said
    assert call(evaluate, "checkpoint=nowhere", "tasks=[a.yaml,b.yaml]", "shots=-2") == 2
    said = capsys.readouterr().err
    for line in ("tasks=a.yaml: there is", "tasks=b.yaml: there is", "checkpoint=nowhere: no", "shots=-2 must be"):
        assert f"error: {line}" in said
