"""Training through its command line: interrupted equals uninterrupted, whoever interrupts."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_shard
from data_pipeline.shards.scores import load_scores
from data_pipeline.stream.count import count
from data_pipeline.stream.score_filter import ScoreFilter
from launch.curves import series_of
from launch.panels import SECTIONS, keys_of
from megatron_tn import load_pretrained
from megatron_tn.convert import main as convert
from megatron_tn.evaluate import main as evaluate
from megatron_tn.evaluation.perplexity import document_nats
from megatron_tn.generate import main as generate_main
from megatron_tn.loading import load_any_model
from megatron_tn.score import main as score
from megatron_tn.train import main as train
from megatron_tn.training.run_folder import RunFolder
from tests.helpers import hub
from tests.helpers.checkpoints import load_model
from tests.helpers.golden import relative_to_max
from tests.helpers.training import SMALL, call, fork_ranks, losses, records, train_forked, train_here

STEPS = 12


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """An uninterrupted run: tensor parallel 2 x ZeRO 1 in bf16."""
    folder = tmp_path_factory.mktemp("trained")
    settings = (*settings_over(shards), "logging.wandb.mode=offline", "evaluation.prompts=[the cat,'']")
    evaluation = (f"evaluation.manifest={shards}", "evaluation.max_documents=20", "evaluation.prompt_tokens=5")
    words = (*settings, *evaluation, "logging.progress=true", f"run_dir={folder / 'run'}")
    train_forked(2, *words, function=train_and_say, args=(str(folder / "said"),))
    return folder / "run"


def train_and_say(overrides: tuple[str, ...], said: str) -> None:
    """Train; standard output goes to the end of the file `said`."""
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    train_here(overrides)


def settings_over(manifest: Path | str) -> tuple[str, ...]:
    training = ("data.micro_batch=2", f"schedule.steps={STEPS}", "parallel.tp=2", "checkpoint.keep=0")
    return (*SMALL, f"data.manifest={manifest}", *training)


def settings_of(run: Path) -> tuple[str, ...]:
    return settings_over(json.loads((run / "config.json").read_text())["data"]["manifest"])


def test_it_learns_and_leaves_everything_behind(trained):
    curve = losses(trained)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 0.5
    status = RunFolder(trained).status()
    assert (status["state"], status["step"]) == ("finished", STEPS)
    (evaluated,) = records(trained, "heldout_bits_per_byte")
    assert evaluated["step"] == STEPS
    assert [text["prompt"] for text in evaluated["texts"]] == ["the cat", ""]
    assert all(text["text"] for text in evaluated["texts"])
    assert 0 < evaluated["heldout_bits_per_byte"] < 8
    (progress,) = re.findall(f"^step {STEPS}/.*", (trained.parent / "said").read_text(), re.MULTILINE)
    assert f"  held-out {evaluated['heldout_loss']:.3f}  " in progress
    values = series_of(RunFolder(trained).records())
    without = {panel.title for section in SECTIONS.values() for panel in section if not keys_of(panel, values)}
    assert without == {"Tasks", "Ranks", "Utilisation", "Peak of a GPU"}  # of every hundredth step, or of a GPU
    (saved,) = records(trained, "checkpoint/write_s")
    assert (saved["checkpoint/step"], saved["checkpoint/failed"]) == (STEPS, False)
    assert saved["checkpoint/write_s"] > 0
    pauses = [record["checkpoint/pause_s"] for record in records(trained, "checkpoint/pause_s")]  # and the last wait
    assert sum(pauses) == records(trained, "goodput")[-1]["goodput/checkpoint_s"] > min(pauses) > 0
    assert list((trained / "wandb").glob("offline-run-*/*.wandb"))
    assert (trained / "tokenizer.json").is_file()


def test_two_interruptions_change_nothing(trained, tmp_path):
    """Loss, masters, moments, optimizer step, data position and RNG, bitwise; the vocabulary divides by no rank."""
    run = tmp_path / "run"
    for stop in (5, 9, 0):
        train_forked(2, *settings_of(trained), f"run_dir={run}", f"stop_after={stop}")
    assert losses(run) == losses(trained)
    name = f"checkpoints/step_{STEPS:08d}"
    for rank in range(2):
        one, other = (load_file(folder / name / f"rank_0000{rank}.safetensors") for folder in (run, trained))
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    one, other = (json.loads((folder / name / "manifest.json").read_text()) for folder in (run, trained))
    for manifest in (one, other):
        del manifest["training"]["held_out"]  # one of the runs evaluated
    for key in ("step", "optimizer_step", "training", "pieces", "shapes"):
        assert one[key] == other[key], key


def test_weights_to_start_from_are_a_runs_or_an_exports(trained, tmp_path, capsys):
    """With a fresh optimizer, in another layout. An export holds bf16 weights, as the forward pass does."""
    assert call(convert, "export", f"checkpoint={trained}", f"output={tmp_path / 'export'}") == 0
    settings = (*settings_of(trained), "parallel.tp=1", "seed=5", "schedule.steps=3", "optim.lr=1e-4")
    for name, source, engine in (("a", trained, "engine=zero1"), ("b", tmp_path / "export", "engine=fsdp2")):
        run = f"run_dir={tmp_path / name}"
        train_forked(1, *settings, engine, run, f"init_from={source}", "stop_after=1")
    first = losses(tmp_path / "a")[1]
    assert losses(tmp_path / "b")[1] == first
    assert first < losses(trained)[STEPS] + 0.1
    # A run with a checkpoint of its own goes on from that.
    train_forked(1, *settings, f"run_dir={tmp_path / 'a'}", f"init_from={tmp_path / 'gone'}")
    (saved,) = (path for step, path in RunFolder(tmp_path / "a").saved().items() if step == 3)
    assert json.loads((saved / "manifest.json").read_text())["optimizer_step"] == 3
    none = f"run_dir={tmp_path / 'none'}"
    assert call(train, *settings, none, f"init_from={tmp_path / 'gone'}") == 2
    assert f"init_from={tmp_path / 'gone'}: no checkpoint, run or released model is there" in capsys.readouterr().err
    assert call(train, *settings, none, f"init_from={trained}", "model.glu_dim=64") == 2
    assert "holds another model: model.glu_dim=48, not 64" in capsys.readouterr().err
    assert call(train, *settings, none, f"init_from={trained}", f"checkpoint.resume={saved}") == 2
    both = f"init_from={trained} and checkpoint.resume={saved}, of another run, both say what the run begins from"
    assert both in capsys.readouterr().err


def test_a_checkpoint_of_other_data_is_refused_by_the_settings_or_the_shards(trained, shards, tmp_path, capsys):
    settings = (*settings_of(trained), "parallel.tp=1", f"run_dir={tmp_path / 'run'}", f"checkpoint.resume={trained}")
    assert call(train, *settings, "data.sequence_length=16", "seed=5", "data.global_batch=8") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert " was trained on other data: data.sequence_length: 32 -> 16, seed: 0 -> 5; train on its data, or " in line
    copy = Path(shutil.copytree(shards.parent, tmp_path / "shards")) / shards.name
    manifest = json.loads(copy.read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    copy.write_text(json.dumps(manifest))
    assert call(train, *settings, f"data.manifest={copy}") == 2
    assert f"was trained on other data: data.manifest: '{shards}' -> '{copy}'; train on" in capsys.readouterr().err


def signal_in_a_step(overrides: tuple[str, ...], number: int) -> None:
    """Rank 1 alone is signalled while it takes its third step."""
    import megatron_tn.train as module

    real, taken = module.train_step, []

    def step(*arguments, **options):
        taken.append(1)
        if os.environ["RANK"] == "1" and len(taken) == 3:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    module.train_step = step
    train_here(overrides)


@pytest.mark.parametrize(
    ("number", "codes"),
    [(signal.SIGUSR1, [0, 0]), (signal.SIGINT, [0, 130])],  # TERM: test_operations
    ids=["USR1", "INT"],
)
def test_a_signal_to_one_rank_saves_one_step_on_all(trained, tmp_path, number, codes):
    run = tmp_path / "run"
    ranks = fork_ranks(2, signal_in_a_step, (*settings_of(trained), f"run_dir={run}"), number)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == codes
    status = RunFolder(run).status()
    assert (status["state"], status["step"]) == ("preempted", 4)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000004"]
    assert losses(run) == {step: loss for step, loss in losses(trained).items() if step <= 4}
    if number == signal.SIGUSR1:
        train_forked(2, *settings_of(trained), f"run_dir={run}")
        assert losses(run) == losses(trained)


@pytest.mark.parametrize("output", ["", "checkpoints/step_00000012"], ids=["run", "checkpoint"])
def test_an_export_does_not_overwrite_a_run(trained, capsys, output):
    before = (trained / "config.json").read_bytes()
    assert call(convert, "export", f"checkpoint={trained}", f"output={trained / output}") == 2
    assert "is the folder of a run or a checkpoint" in capsys.readouterr().err
    assert (trained / "config.json").read_bytes() == before
    assert not (trained / output / "model.safetensors").exists()


def test_exported_model_is_the_trained_one(trained, tmp_path):
    folder = tmp_path / "export"
    assert call(convert, "export", f"checkpoint={trained}", f"output={folder}") == 0
    tokens = torch.arange(1, 33).view(1, -1)
    exported = load_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(exported(tokens).logits, load_model(trained / f"checkpoints/step_{STEPS:08d}")(tokens).logits)
    said = (folder / "README.md").read_text()
    assert "- steps: 12\n" in said
    assert "documents" in said  # of its data's sources
    assert said.count("trust_remote_code=True") == 2  # else transformers asks, of the tokenizer too, and waits
    manifest = settings_of(trained)[len(SMALL)].partition("=")[2]
    assert Path(manifest).name in said
    assert manifest not in said  # no folders of this machine
    tokenizer = Manifest.load(manifest).tokenizer
    generation = json.loads((folder / "generation_config.json").read_text())
    wanted = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    assert generation == wanted


@torch.no_grad()
def test_trained_exported_prefilled_and_decoded_logits_agree(trained, tmp_path):
    """Promise of one model, however it is run: in fp32, with the rounded weights that were trained."""
    folder = tmp_path / "export"
    assert call(convert, "export", f"checkpoint={trained}", f"output={folder}", "precision=fp32") == 0
    tokens = torch.arange(300).view(2, 150) % 401
    model = load_any_model(str(trained), "cpu", "fp32")
    wanted = model(tokens).logits
    found = {"exported": load_pretrained(folder)(tokens).logits}
    for way, parts in (("chunked prefill", (70, 1, 79)), ("one-token decoding", (138, *12 * (1,)))):
        state, logits = None, []
        for part in tokens.split(parts, dim=1):
            out = model(part, state=state, return_state=True)
            state = out.state
            logits.append(out.logits)
        found[way] = torch.cat(logits, dim=1)
    for way, logits in (found | hub.logits_by_path(folder, tokens)).items():
        assert relative_to_max(logits, wanted) < 1e-4, way


def test_training_goes_on_from_imported_weights(trained, tmp_path):
    """Of an export, at another layout, engine and sequence length: a fresh optimizer and the data's beginning."""
    folder, run = tmp_path / "export", tmp_path / "run"
    assert call(convert, "export", f"checkpoint={trained}", f"output={folder}") == 0
    assert call(convert, "import", f"checkpoint={folder}", f"output={run}") == 0
    changes = ("parallel.tp=1", "engine=fsdp2", "data.sequence_length=48", "schedule.steps=3")
    train_forked(2, *settings_of(trained), *changes, f"run_dir={run}")
    assert list(losses(run)) == [1, 2, 3]
    assert losses(run)[1] < losses(trained)[STEPS // 2] < losses(trained)[1]
    manifest = json.loads((run / "checkpoints/step_00000003/manifest.json").read_text())
    assert (manifest["optimizer_step"], manifest["state_kinds"]) == (3, ["exp_avg", "exp_avg_sq"])


def test_generate_continues_a_prompt_with_spaces_and_signs(trained, capsys):
    words = (f"checkpoint={trained / 'checkpoints' / 'latest'}", "max_new_tokens=12", "temperature=0", "device=cpu")
    said = []
    for _ in range(2):
        assert call(generate_main, *words, "prompt= the cat's (${x}), [y=1] ") == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith(" the cat's (${x}), [y=1] ")
    assert len(said[0]) > len(" the cat's (${x}), [y=1] ") + 4


def test_evaluate_agrees_with_the_loop(trained, tmp_path, capsys):
    manifest = json.loads((trained / "config.json").read_text())["data"]["manifest"]
    output = tmp_path / "evaluation.json"
    words = (f"checkpoint={trained}", f"manifest={manifest}", f"train_manifest={manifest}", "max_documents=20")
    assert call(evaluate, *words, f"output={output}", "device=cpu") == 0
    found = json.loads(output.read_text())
    shown = capsys.readouterr().out.splitlines()
    assert [line.strip("│ ").split()[0] for line in shown[3:-2]] == ["model", "unigram", "gzip", "xz"]
    figures = (f"{found['bits_per_byte']['model']:.4f}", f"{found['nats_per_token']:.4f}", f"{found['tokens']:,}", "20")
    assert shown[3].replace("│", "").split() == ["model", *figures]
    assert shown[-1] == f"wrote {output}"
    (in_loop,) = records(trained, "heldout_bits_per_byte")
    assert found["bits_per_byte"]["model"] == pytest.approx(in_loop["heldout_bits_per_byte"], rel=5e-3)
    assert set(found["bits_per_byte"]) == {"model", "unigram", "gzip -9", "xz -9"}
    for first, figures in found["positions"].items():
        assert figures["nats_per_token"] == pytest.approx(in_loop[f"heldout_loss/after_{first}"], rel=5e-3)
    assert found["sources"]["test"]["bits_per_byte"] == found["bits_per_byte"]["model"]
    assert sum(figures["text_bytes"] for figures in found["positions"].values()) == found["text_bytes"]


def test_scores_are_written_once_and_are_the_models(trained, tmp_path, capsys, monkeypatch):
    """Two processes share the shards; a third finds nothing left, and the stream's filter reads what they wrote."""
    source = Path(json.loads((trained / "config.json").read_text())["data"]["manifest"]).parent
    shards = tmp_path / "shards"
    shutil.copytree(source, shards)
    words = (f"checkpoint={trained}", f"manifest={shards / 'manifest.json'}", "device=cpu", "precision=fp32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert call(score, *words) == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert call(score, *words) == 0
    said = capsys.readouterr().out.splitlines()
    name, counts = said[0].partition(":")[0], [int(line.split()[1]) for line in said]
    manifest = Manifest.load(shards / "manifest.json")
    assert counts == [counts[0], manifest.totals.documents - counts[0], 0]
    assert name.startswith("eval-")
    model = load_any_model(str(trained), "cpu", "fp32")
    for shard in manifest.shards:
        found, _ = load_scores(manifest.read, shard, name)
        documents = [document.tokens for document in read_shard(manifest, shard)]
        nats = np.array(document_nats(model, documents)) / [len(ids) - 1 for ids in documents]
        np.testing.assert_allclose(found[:, 0], nats, rtol=1e-4)
    kept = ScoreFilter(scores=name, default=(0.0, float(np.median(found[:, 0]))))
    assert 0 < count(manifest, kept).documents.sum() < manifest.totals.documents


def test_a_sweep_gives_every_job_a_folder_named_by_what_it_varies(shards, tmp_path):
    words = (*SMALL, f"data.manifest={shards}", f"run_dir={tmp_path / 'sweep'}", "schedule.steps=3")
    train_forked(1, "--multirun", *words, "model.decay=released,none", "seed=1,2")
    names = ["0_model.decay-released_seed-1", "1_model.decay-released_seed-2"]
    names += ["2_model.decay-none_seed-1", "3_model.decay-none_seed-2"]
    curves = [losses(tmp_path / "sweep" / name) for name in names]
    assert len({tuple(curve.values()) for curve in curves}) == 4
    assert all(list(curve) == [1, 2, 3] for curve in curves)
    # A job's goodput is of its own time: it begins where the job before ended.
    folders = [RunFolder(tmp_path / "sweep" / name) for name in names]
    ends = [folder.records("time")[-1]["time"] for folder in folders]
    assert all(end <= folder.starts()[0] for end, folder in zip(ends[:-1], folders[1:], strict=True))
