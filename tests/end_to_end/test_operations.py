"""What operators rely on: the slow rank's name, profiles, being told to stop at any moment, saves that fail."""

import gzip
import json
import os
import re
import signal
import time

import pytest
import torch.distributed.run

from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, whole_checkpoints
from megatron_tn.train import main as train
from megatron_tn.training.hooks.profile import Profile
from megatron_tn.training.preemption import hold_signals
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from tests.helpers.training import SMALL, call, fork_ranks, losses, records, train_forked, train_here

STEPS = 6


@pytest.fixture(scope="module")
def words(shards) -> tuple[str, ...]:
    evaluation = (f"evaluation.manifest={shards}", "evaluation.every=2", "evaluation.max_documents=80")
    training = ("engine=local", "data.micro_batch=2", f"schedule.steps={STEPS}")
    return (*SMALL, *training, f"data.manifest={shards}", *evaluation)


NO_EVALUATION = "evaluation.every=0"  # which changes no loss


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train_forked(2, *words, f"run_dir={run}", "checkpoint.every=2", "checkpoint.keep=1", "checkpoint.keep_best=1")
    return run


def test_the_best_checkpoint_stays(uninterrupted):
    found = {record["step"]: record["heldout_loss"] for record in records(uninterrupted, "heldout_loss")}
    best = min(found, key=found.get)
    assert [path.name for path in whole_checkpoints(uninterrupted / "checkpoints")] == [
        f"step_{step:08d}" for step in sorted({best, STEPS})
    ]


def signal_at(overrides: tuple[str, ...], moment: str) -> None:
    """Rank 1 is told to stop before the preflight, while kernels are checked, or within the evaluation after step 4."""
    import megatron_tn.train as module

    if os.environ["RANK"] == "1" and moment == "start":
        hold_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
    if os.environ["RANK"] == "1" and moment == "warm-up":
        module.check_kernels = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    if os.environ["RANK"] == "1" and moment == "evaluation":
        real, times = module.evaluate_in_training, []

        def evaluate_in_training(*arguments, **options):
            times.append(1)
            if len(times) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(*arguments, **options)

        module.evaluate_in_training = evaluate_in_training
    train_here(overrides)


@pytest.mark.parametrize(("moment", "step"), [("start", 1), ("warm-up", 1), ("evaluation", 5)])
def test_told_to_stop_at_any_moment_it_saves_and_goes_on(words, uninterrupted, tmp_path, moment, step):
    run = tmp_path / "run"
    train_forked(2, *words, f"run_dir={run}", function=signal_at, args=(moment,))
    assert RunFolder(run).status()["state"] == "preempted"
    assert [path.name for path in whole_checkpoints(run / "checkpoints")] == [f"step_{step:08d}"]
    evaluated = [record["step"] for record in records(run, "heldout_loss")]
    assert evaluated == [2][: step // 2]  # the one that was under way is left
    train_forked(2, *words, f"run_dir={run}")
    assert losses(run) == losses(uninterrupted)
    last = {record["step"]: record["heldout_loss"] for record in records(run, "heldout_loss")}[STEPS]
    assert last == records(uninterrupted, "heldout_loss")[-1]["heldout_loss"]


def test_told_to_stop_among_batches_that_are_left_out_it_stops_there(words, tmp_path):
    run = tmp_path / "run"
    skip = f"data.skip_batches=['1-{STEPS - 1}']"
    train_forked(2, *words, skip, f"run_dir={run}", function=signal_at, args=("warm-up",))
    assert RunFolder(run).status()["state"] == "preempted"
    assert [path.name for path in whole_checkpoints(run / "checkpoints")] == ["step_00000001"]


def until_step(run, step: int) -> None:
    deadline = time.time() + 120
    while time.time() < deadline:
        if max((record["step"] for record in RunFolder(run).records("loss")), default=0) >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run} is not at step {step}")


LONG = ("data.workers=2", "schedule.steps=100000", NO_EVALUATION, "logging.wandb.mode=offline")


def train_in_a_group(overrides: tuple[str, ...], said: str, torchrun: bool) -> None:
    """With all that it starts, readers and wandb's process among them, in a process group of its own."""
    os.setpgid(0, 0)
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    if not torchrun:
        train_here(overrides)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    command = ["torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m", "megatron_tn.train"]
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.distributed.run.main([*command[1:], *overrides])


@pytest.mark.parametrize(
    ("torchrun", "number", "code"),
    [(False, signal.SIGTERM, 0), (True, signal.SIGINT, 1)],  # 130, Ctrl-C's own code: test_train
    ids=["TERM", "Ctrl-C under torchrun"],
)
def test_a_signal_to_every_process_readers_included_saves_as_well(words, tmp_path, torchrun, number, code):
    """As SLURM, containers and terminals send it. torchrun passes SIGINT on once more, and has its own exit code."""
    run, log = RunFolder(tmp_path / "run"), tmp_path / "said"
    (process,) = fork_ranks(1, train_in_a_group, (*words, f"run_dir={run}", *LONG), str(log), torchrun)
    until_step(run.path, 3)
    os.killpg(process.pid, number)
    process.join(60)
    said = log.read_text()
    assert process.exitcode == code, said
    status = run.status()
    assert status["state"] == "preempted"
    assert list(run.saved()) == [status["step"]] == [run.records("loss")[-1]["step"]]
    assert said.count(f"saved step {status['step']}; the same command continues the run") == 1
    assert "megatron_tn/train.py" not in said  # no traceback of a trainer


def test_of_two_runs_that_start_in_one_folder_at_once_one_trains(words, tmp_path, capsys):
    run = tmp_path / "run"
    many = (*words, "data.workers=1", "schedule.steps=100000", NO_EVALUATION, f"run_dir={run}")
    both = [fork_ranks(1, train_here, many)[0] for _ in range(2)]
    until_step(run, 1)
    while all(process.is_alive() for process in both):
        time.sleep(0.05)
    first, refused = sorted(both, key=lambda process: not process.is_alive())
    assert (first.exitcode, refused.exitcode) == (None, 2)
    assert call(train, *many) == 2  # and so it is as long as the first one trains
    assert f"run_dir={run} is in use: rank 0 (host " in capsys.readouterr().err
    first.kill()
    first.join()
    train_forked(1, *many, "stop_after=2")  # its lock is gone with it


def signal_the_job(overrides: tuple[str, ...], number: int) -> None:
    """A sweep whose first job is signalled in its second step."""
    import megatron_tn.train as module

    real = module.train_step
    taken = []

    def step(*arguments, **options):
        taken.append(1)
        if len(taken) == 2:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    module.train_step = step
    train_here(overrides)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["TERM", "Ctrl-C"])
def test_a_sweep_that_is_told_to_stop_begins_no_other_job(words, tmp_path, number, code):
    many = ("schedule.steps=100000", NO_EVALUATION, f"run_dir={tmp_path}", "seed=1,2", "--multirun")
    (process,) = fork_ranks(1, signal_the_job, (*words, *many), number)
    process.join(60)
    assert process.exitcode == code
    assert RunFolder(tmp_path / "0_seed-1").status()["state"] == "preempted"
    assert not (tmp_path / "1_seed-2").exists()


def slow_ranks(overrides: tuple[str, ...], said: str) -> None:
    """Rank 0 reads slowly, and rank 1 computes slowly."""
    import megatron_tn.train as module

    if os.environ["RANK"] == "1":
        build = module.build_engine

        def build_engine(*arguments):
            engine = build(*arguments)
            engine.model.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.1))
            return engine

        module.build_engine = build_engine
    else:
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
        open_batches = module.open_batches

        def slow_batches(config, stream, *others):
            record = stream.record
            stream.record = lambda batch: (time.sleep(0.1), record(batch))
            return open_batches(config, stream, *others)

        module.open_batches = slow_batches
    train_here(overrides)


def test_the_slow_rank_is_named(words, tmp_path):
    arguments = (*words, f"run_dir={tmp_path / 'run'}", "logging.ranks_every=3", NO_EVALUATION, "stop_after=3")
    train_forked(2, *arguments, "data.micro_batch=1", function=slow_ranks, args=(str(tmp_path / "said"),))
    (record,) = records(tmp_path / "run", "ranks/forward_s")
    assert record["step"] == 3
    said = (tmp_path / "said").read_text()
    for rank, what, told in ((0, "data", "waiting for data take"), (1, "forward", "forward passes take")):
        assert record[f"ranks/{what}_slowest"].startswith(f"rank {rank} (")
        assert record[f"ranks/{what}_s_max"] >= 0.2  # two microbatches a step
        assert re.search(f"rank {rank} on host \\S+ is slow: {told}", said)


def test_a_profile_of_the_steps_that_were_asked_for(words, uninterrupted, tmp_path):
    run = tmp_path / "run"
    profile = ("logging.profile=true", "logging.profile_skip=2", "logging.profile_steps=2")
    train_forked(2, *words, NO_EVALUATION, f"run_dir={run}", *profile)
    names = ["steps_3_to_4.trace.json.gz", "steps_3_to_4.txt"]
    assert sorted(path.name for path in (run / "profile").iterdir()) == names
    with gzip.open(run / "profile" / "steps_3_to_4.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events) == 2
    table = (run / "profile" / "steps_3_to_4.txt").read_text()
    assert "Self CPU" in table
    assert "aten::mm" in table
    assert losses(run) == losses(uninterrupted)


def test_a_start_that_ends_before_its_profile_says_so(tmp_path, caplog):
    hook, state = Profile(tmp_path / "profile", skip=10, steps=3), TrainingState()
    hook.on_start(state)
    state.step = 2
    hook.on_step(state, None)
    hook.on_stop(state)
    assert "this start ended with step 2, before step 11; lower logging.profile_skip=10" in caplog.text
    assert not hook.folder.exists()


def fail_to_write(overrides: tuple[str, ...], said: str, from_save: int) -> None:
    """Rank 1 cannot write from that save on."""
    from megatron_tn.checkpoint import save

    os.dup2(os.open(f"{said}.{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY), 2)
    real, times = save.write_tensors, []

    def write_tensors(*arguments):
        times.append(1)
        if os.environ["RANK"] == "1" and len(times) == from_save:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    save.write_tensors = write_tensors
    train_here(overrides)


def test_a_save_that_fails_is_reported_and_training_goes_on(words, uninterrupted, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    more = (NO_EVALUATION, f"run_dir={run}", "checkpoint.every=2")
    train_forked(2, *words, *more, function=fail_to_write, args=(str(said), 1))
    assert losses(run) == losses(uninterrupted)
    saves = records(run, "checkpoint/failed")
    assert [record["checkpoint/step"] for record in saves if record["checkpoint/failed"]] == [2]
    assert "rank 1: OSError: [Errno 28] No space left on device" in (tmp_path / "said.0").read_text()
    assert "OSError" not in (tmp_path / "said.1").read_text()  # said once, not once a rank
    assert [path.name for path in whole_checkpoints(run / "checkpoints")] == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(("more", "save"), [((), 3), (("checkpoint.on_failure=abort",), 1)], ids=["the last", "abort"])
def test_a_save_that_fails_ends_the_run_when_it_must(words, tmp_path, more, save):
    arguments = (*words, NO_EVALUATION, f"run_dir={tmp_path / 'run'}", "checkpoint.every=2", *more)
    ranks = fork_ranks(2, fail_to_write, arguments, str(tmp_path / "said"), save)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    status = RunFolder(tmp_path / "run").status()
    assert status["state"] == "failed"
    assert "could not be written: rank 1: OSError" in status["error"]


def cut(checkpoint) -> None:
    path = checkpoint / "rank_00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def flip(checkpoint) -> None:
    path = checkpoint / "rank_00000.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def content_of(run: RunFolder) -> dict:
    """File of a run -> its content, without the lock and signs of life."""
    files = [path for path in run.path.rglob("*") if path.is_file() and run.ranks not in path.parents]
    return {path: path.read_bytes() for path in files if path.name != "run.lock"}


def test_damaged_newest_checkpoints_are_left_out_and_kept(words, uninterrupted, tmp_path, capsys, monkeypatch):
    statuses, put_back = [], RunFolder.put_back
    monkeypatch.setattr(RunFolder, "put_back", lambda self: (statuses.append(self.status()), put_back(self)))
    run = RunFolder(tmp_path / "run")
    again = (*words, NO_EVALUATION, f"run_dir={run}")
    train_forked(2, *again, "checkpoint.every=1", "stop_after=4")
    second, third, fourth = run.whole_checkpoints()
    cut(fourth)
    flip(third)  # of the size that was written
    before = content_of(run)
    assert call(train, *again, "checkpoint.resume=3", "parallel.tp=1") == 2
    damaged = f"{third / 'rank_00000.safetensors'} is damaged: its sha256 is "
    assert f"error: checkpoint.resume=3: {damaged}" in capsys.readouterr().err
    assert statuses[0]["step"] == 3  # known before the checkpoint is loaded
    assert content_of(run) == before
    assert call(train, *again, f"run_dir={tmp_path / 'new'}", f"checkpoint.resume={third}") == 2
    assert not (tmp_path / "new").exists()
    read_alone = fourth / "rank_00000.safetensors"
    os.truncate(read_alone, 7)
    assert call(train, *again, "checkpoint.resume=4", "checkpoint.verify=false", "parallel.tp=1") == 2
    damaged = f"{read_alone} is damaged: it ends at byte 7"
    assert f"error: checkpoint.resume=4: {damaged}" in capsys.readouterr().err
    train_forked(2, *again)
    assert losses(run.path) == losses(uninterrupted)
    assert len(list(run.checkpoints.glob("step_0000000[34].damaged-*"))) == 2
    (rewind,) = CheckpointManifest.read(run.whole_checkpoints()[-1]).training["rewinds"]
    assert (rewind["from"], rewind["to"], rewind["by"]) == (4, 2, "damage")
    assert "rank_00001.safetensors has " in rewind["reason"]
    assert "rank_00000.safetensors is damaged" in rewind["reason"]

    (second / MANIFEST).unlink()
    cut(run.whole_checkpoints()[-1])  # no other is left
    assert call(train, *again) == 2
    assert f"all checkpoints in {run.checkpoints} are damaged; move them away" in capsys.readouterr().err
