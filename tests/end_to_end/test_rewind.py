"""Rewinding and skipping through the command line: whoever asks for it, the run is as if the batch had never been."""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest

from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, whole_checkpoints
from megatron_tn.train import main as train
from tests.helpers.training import SMALL, call, fork_ranks, losses, records, train_forked, train_here

STEPS, BAD, BATCH = 12, 7, 4
WORDS = (
    *SMALL,
    "data.micro_batch=2",
    f"schedule.steps={STEPS}",
    "checkpoint.every=4",
    "checkpoint.keep=0",
    "engine=zero1",
)
WORDS = (*WORDS, "guard.spike=rewind", "guard.spike_nats=3", "guard.spike_window=4")


def train_with_a_bad_batch(overrides: tuple[str, ...], fault: str, bad: int = BAD) -> None:
    """As if batch `bad` were poison: whoever trains on it gets a high loss, or no finite one."""
    import megatron_tn.train as module

    real = module.train_step

    def step(engine, microbatches, lr, device, *, stop):
        poisoned = any(index // BATCH == bad - 1 for batch in microbatches for index in batch.indices)
        if poisoned and fault == "nan":
            parameter = next(engine.model.parameters())
            hook = parameter.register_hook(lambda gradient: gradient * math.nan)
            report = real(engine, microbatches, lr, device, stop=stop)
            hook.remove()
            return report
        report = real(engine, microbatches, lr, device, stop=stop)
        # High enough for a spike by eight of the deviations that so few, falling losses have.
        return report._replace(loss=report.loss + 20) if poisoned else report

    module.train_step = step
    train_here(overrides)


def last_checkpoint(run: Path) -> tuple[CheckpointManifest, dict[str, str]]:
    manifest = CheckpointManifest.read(whole_checkpoints(run / "checkpoints")[-1])
    return manifest, {name: record.sha256 for name, record in manifest.files.items()}


def assert_same_run(run: Path, wanted: Path) -> None:
    """The same curve, each step once and in order, and bitwise the same end."""
    assert losses(run) == losses(wanted)
    steps = [record["step"] for record in records(run, "loss") + records(run, "skipped")]
    assert sorted(steps) == list(range(1, STEPS + 1))
    (manifest, files), (wanted_manifest, wanted_files) = last_checkpoint(run), last_checkpoint(wanted)
    assert files == wanted_files
    assert manifest.optimizer_step == wanted_manifest.optimizer_step == STEPS - 1
    for key in ("step", "tokens", "samples", "skip", "stream", "recent_losses"):
        assert manifest.training[key] == wanted_manifest.training[key], key


@pytest.fixture(scope="module")
def words(shards) -> tuple[str, ...]:
    return (*WORDS, f"data.manifest={shards}")


@pytest.fixture(scope="module")
def wanted(words, tmp_path_factory) -> Path:
    """The run that was told from the start to leave the batch out."""
    run = tmp_path_factory.mktemp("wanted") / "run"
    train_forked(2, *words, f"run_dir={run}", f"data.skip_batches=[{BAD}]")
    assert [record["step"] for record in records(run, "skipped")] == [BAD]
    tokens = {record["step"]: record["tokens"] for record in records(run, "tokens")}
    assert tokens[BAD] == tokens[BAD - 1]
    rates = {record["step"]: record["lr"] for record in records(run, "lr")}
    assert rates[BAD + 1] < rates[BAD - 1]  # the schedule goes by the step, and the batch has used its step up
    return run


def test_a_spike_rewinds_by_itself(words, wanted, tmp_path):
    run = tmp_path / "run"
    arguments = (*words, "logging.wandb.mode=offline", f"run_dir={run}")
    train_forked(2, *arguments, function=train_with_a_bad_batch, args=("spike",))
    assert_same_run(run, wanted)
    (rewind,) = records(run, "rewind/from")
    assert (rewind["step"], rewind["rewind/from"], rewind["rewind/skip"]) == (4, BAD, [BAD])
    superseded = [json.loads(line) for line in (run / "log.superseded.jsonl").read_text().splitlines()]
    assert [record["step"] for record in superseded if "loss" in record] == [5, 6]
    assert any("guard/spike" in record for record in superseded)
    (note,) = last_checkpoint(run)[0].training["rewinds"]
    assert (note["from"], note["to"], note["skip"], note["by"]) == (BAD, 4, [BAD], "guard")
    first = (run / "wandb_id").read_text()
    parts = {path.stem.removeprefix("run-") for path in (run / "wandb").glob("offline-run-*/*.wandb")}
    assert parts == {first, f"{first}-r1"}


def test_a_value_that_is_not_finite_rewinds_before_there_is_a_checkpoint(words, wanted, tmp_path):
    run = tmp_path / "run"
    arguments = (*words, "checkpoint.every=0", "guard.nonfinite=rewind", f"run_dir={run}")
    train_forked(2, *arguments, function=train_with_a_bad_batch, args=("nan",))
    assert_same_run(run, wanted)
    assert records(run, "rewind/from")[0]["step"] == 0


def test_the_save_that_a_rewind_waits_for_is_in_the_log(words, tmp_path):
    run = tmp_path / "run"
    arguments = (*words, "checkpoint.every=6", f"run_dir={run}")
    train_forked(2, *arguments, function=train_with_a_bad_batch, args=("spike",))
    assert records(run, "rewind/from")[0]["step"] == BAD - 1
    assert [record["checkpoint/step"] for record in records(run, "checkpoint/write_s")] == [BAD - 1, STEPS]


def train_and_die_after_the_rewind(overrides: tuple[str, ...]) -> None:
    """The spike, and a death in the second step after it, before anything is saved again."""
    import megatron_tn.train as module

    real, seen = module.rewind, []

    def rewind(*arguments):
        real(*arguments)
        seen.append(1)

    def skipped_step(*arguments, **options):
        if seen:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_skip(*arguments, **options)

    real_skip, module.skipped_step, module.rewind = module.skipped_step, skipped_step, rewind
    train_with_a_bad_batch(overrides, "spike")


def test_a_rewind_is_not_forgotten_when_the_process_dies_before_the_next_save(words, wanted, tmp_path):
    """The next start is told nothing of the batch, and does not train on it."""
    run = tmp_path / "run"
    arguments = (*words, f"run_dir={run}")
    ranks = fork_ranks(2, train_and_die_after_the_rewind, arguments)
    for rank in ranks:
        rank.join(100)
    assert -signal.SIGKILL in [rank.exitcode for rank in ranks]
    assert [path.name for path in whole_checkpoints(run / "checkpoints")] == ["step_00000004"]
    train_forked(2, *arguments)
    assert_same_run(run, wanted)
    (note,) = last_checkpoint(run)[0].training["rewinds"]
    assert (note["from"], note["to"], note["skip"], note["by"]) == (BAD, 4, [BAD], "guard")


def train_with_damage(overrides: tuple[str, ...], checkpoints: str, left: int) -> None:
    """The spike, before which all but the first `left` checkpoints lose half of a file."""
    import megatron_tn.train as module

    real = module.train_step

    def step(engine, microbatches, lr, device, *, stop):
        if any(index // BATCH == BAD - 1 for batch in microbatches for index in batch.indices):
            for path in whole_checkpoints(Path(checkpoints))[left:]:
                os.truncate(path / "rank_00000.safetensors", 1000)
        return real(engine, microbatches, lr, device, stop=stop)

    module.train_step = step
    train_with_a_bad_batch(overrides, "spike")


def test_a_rewind_leaves_damaged_checkpoints_out(words, tmp_path):
    run = tmp_path / "run"
    arguments = (*words, "checkpoint.every=3", "checkpoint.async_save=false", f"run_dir={run}")
    train_forked(2, *arguments, function=train_with_damage, args=(str(run / "checkpoints"), 1))
    assert records(run, "rewind/from")[0]["step"] == 3
    (kept,) = (run / "checkpoints").glob("step_00000006.damaged-*")
    assert (kept / "rank_00000.safetensors").stat().st_size == 1000
    assert [record["step"] for record in records(run, "loss")] == [step for step in range(1, 13) if step != BAD]


def test_a_rewind_with_no_whole_checkpoint_ends_the_run(words, tmp_path):
    run = tmp_path / "run"
    arguments = (*words, "checkpoint.every=3", "checkpoint.async_save=false", f"run_dir={run}")
    ranks = fork_ranks(2, train_with_damage, arguments, str(run / "checkpoints"), 0)
    for rank in ranks:
        rank.join(timeout=100)
    assert [rank.exitcode for rank in ranks] == [2, 2]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "all checkpoints in" in status["error"]
    assert "rank_00000.safetensors has 1000 bytes, but" in status["error"]


def test_the_ledger_outlives_three_restarts(words, wanted, tmp_path):
    run = tmp_path / "run"
    listed = (f"data.skip_batches=[{BAD}]",)
    for stop, skip in ((3, listed), (5, ()), (9, listed), (0, ())):
        train_forked(2, *words, f"run_dir={run}", f"stop_after={stop}", *skip)
    assert_same_run(run, wanted)


def train_and_say(overrides: tuple[str, ...], said: str) -> None:
    os.dup2(os.open(f"{said}.{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    train_here(overrides)


def test_rewinding_by_hand(words, wanted, tmp_path, capsys):
    run = tmp_path / "run"
    train_forked(2, *words, f"run_dir={run}", "stop_after=9")
    before = losses(run)
    assert call(train, *words, f"run_dir={run}", f"data.skip_batches=[{BAD}]") == 2
    assert f"step_00000009 has trained on batch {BAD} already; resume from one before it" in capsys.readouterr().err
    assert call(train, *words, f"run_dir={run}", "checkpoint.resume=5") == 2
    assert f"checkpoint.resume=5 does not exist; run_dir={run} has steps: 4, 8, 9" in capsys.readouterr().err
    rewound = (f"run_dir={run}", "checkpoint.resume=4", f"data.skip_batches=['{BAD}-{BAD}']")
    changed = (*words, *rewound, "stop_after=5", "checkpoint.at_end=false")
    train_forked(2, *changed, function=train_and_say, args=(str(tmp_path / "said"),))
    assert [path.name for path in whole_checkpoints(run / "checkpoints")] == ["step_00000004"]
    kept = sorted((run / "checkpoints").glob("*.rewound-*"))
    assert [path.suffix.partition("-")[0] for path in kept] == [".rewound"] * 2
    said = (tmp_path / "said.0").read_text()
    assert "checkpoint.resume=4 is not the newest checkpoint; later ones are kept" in said
    assert all(str(path) in said for path in kept)
    assert "the new settings win:\ncheckpoint.at_end: True -> False\n" in said
    assert "settings differ" not in (tmp_path / "said.1").read_text()  # said once, not once a rank
    train_forked(2, *words, *rewound)
    assert_same_run(run, wanted)
    assert all((path / MANIFEST).is_file() for path in kept)  # whatever was saved since
    # One is gone on from in another folder. A rewind goes back to it while that folder has no checkpoint of its own.
    back = (f"run_dir={tmp_path / 'back'}", f"checkpoint.resume={kept[0]}", "stop_after=10", "guard.nonfinite=rewind")
    train_forked(2, *words, *back, function=train_with_a_bad_batch, args=("nan", 10))
    assert records(tmp_path / "back", "rewind/from")[0]["step"] == 8
    assert losses(tmp_path / "back") == {9: before[9]}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.skip_batches=[0]", "data.skip_batches: 0 is neither a step from 1 nor a range"),
        ("data.skip_batches=['9-7']", "data.skip_batches: '9-7' is neither"),
        ("data.skip_batches=[13]", "data.skip_batches: step 13 is above schedule.steps=12"),
        ("checkpoint.keep_best=1", "checkpoint.keep_best=1 needs held-out losses"),
        (
            "checkpoint.keep_best=1 evaluation.manifest=x evaluation.every=5",
            "checkpoint.keep_best=1 needs checkpoints of evaluated steps, but the first common multiple of "
            "checkpoint.every=4 and evaluation.every=5, 20, is above schedule.steps=12",
        ),
        ("guard.max_consecutive=0", "guard.max_consecutive=0 must be at least 1"),
        ("guard.spike=explode", "guard.spike='explode': input should be"),
    ],
)
def test_settings(words, tmp_path, capsys, word, message):
    assert call(train, *words, f"run_dir={tmp_path / 'run'}", *word.split()) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_curve_is_ordered(wanted):
    steps = [record["step"] for record in records(wanted, "tokens")]
    assert all(a < b for a, b in itertools.pairwise(steps))
