"""wandb as a copy of the journal: it may fail, asks nothing, and after a rewind or a kill shows one whole curve."""

import contextlib
import importlib.util
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launch import sync
from launch.panels import SECTIONS, workspace
from megatron_tn.config import TrainConfig, WandbConfig, save
from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.hooks.wandb_file import last_step_in, mend_files, messages
from megatron_tn.training.hooks.weights_and_biases import WeightsAndBiases, push
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import Ledger, TrainingState
from tests.helpers.steps import REPORT, WORK
from tests.helpers.training import call, fork_ranks
from tests.helpers.wandb_server import WandbServer


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def hook(folder: RunFolder, mode: str = "offline") -> WeightsAndBiases:
    return WeightsAndBiases(WandbConfig(mode=mode), folder, {"optim": {"lr": 1e-3}}, StepFigures(WORK))


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_wandb_never_stops_training(folder, monkeypatch, caplog, moment):
    import wandb

    class Broken:
        def log(self, *_, **__):
            if moment == "log":
                raise OSError("no route to host")

        def finish(self):
            if moment == "finish":
                raise OSError("no route to host")

    def init(**_):
        if moment == "init":
            raise OSError("no route to host")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    board, state = hook(folder), TrainingState()
    board.on_start(state)
    board.on_step(TrainingState(step=1), REPORT)
    board.on_stop(state)
    assert "no route to host; going on without it" in caplog.text


class Server:
    """What a wandb server has of each run, by id: it knows how far it is when a process resumes one."""

    def __init__(self, monkeypatch, logged_in: bool = True):
        import wandb

        self.steps: dict[str, list[int]] = {}
        self.modes: list[str] = []
        monkeypatch.setattr(wandb, "init", self.init)
        monkeypatch.setattr(wandb, "login", lambda *, prompt, verify: logged_in)

    def init(self, *, id: str, mode: str, **_):
        self.modes.append(mode)
        steps = self.steps.setdefault(id, [])
        server = self

        class Part:
            url = f"https://wandb.example/{id}"
            starting_step = steps[-1] + 1 if steps else 0

            def log(self, values, step):
                server.steps[id].append(step)

            def finish(self): ...

        return Part()


def test_one_curve_after_a_rewind_and_one_id_for_all_processes(folder, monkeypatch):
    server = Server(monkeypatch)
    journal, board, state = Journal(folder.journal, StepFigures(WORK)), hook(folder, "online"), TrainingState()

    def take(steps: int) -> None:
        for _ in range(steps):
            state.count(REPORT, samples=1)
            for one in (journal, board):
                one.on_step(state, REPORT)

    for one in (journal, board):
        one.on_start(state)
    take(6)
    unwritten = folder.wandb / "offline-run-1" / "run-1.wandb"  # what wandb's process has not written yet
    unwritten.parent.mkdir(parents=True)
    unwritten.touch()
    state.become(TrainingState(step=4, rewinds=[{"from": 7, "to": 4}]))
    for one in (journal, board):
        one.on_rewind(state)
    assert unwritten.exists()
    take(3)
    first = folder.wandb_id.read_text()
    part = f"{first}-r1"
    assert server.steps == {first: [1, 2, 3, 4, 5, 6], part: [1, 2, 3, 4, 5, 6, 7]}
    # A restart after a kill: the server lacks a step, and step 8 is not trained for the second time as far as it knows.
    server.steps[part] = [1, 2, 3, 4, 5, 6]
    board = hook(folder, "online")
    board.on_start(state)
    assert not unwritten.exists()
    assert server.steps[part] == [1, 2, 3, 4, 5, 6, 7]
    board = hook(folder, "online")
    board.on_start(TrainingState(step=5, rewinds=state.rewinds))  # of the newest checkpoint
    for step in (6, 7, 8):
        board.on_step(TrainingState(step=step), REPORT)
    assert server.steps[part] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_where_nobody_is_logged_in_it_logs_offline_and_says_so_once(folder, monkeypatch, caplog):
    import wandb

    server = Server(monkeypatch, logged_in=False)
    hook(folder, "online").on_start(TrainingState())

    def wrong_key(**_):
        raise wandb.Error("WANDB_API_KEY invalid: API key must have 40+ characters, has 5.")

    monkeypatch.setattr(wandb, "login", wrong_key)
    hook(folder, "online").on_start(TrainingState())
    assert server.modes == ["offline"] * 2
    offline = ", so it logs offline; `python -m launch.sync` uploads it later"
    assert [record.message for record in caplog.records] == [
        f"wandb: nobody is logged in here{offline}",
        f"wandb: WANDB_API_KEY invalid: API key must have 40+ characters, has 5{offline}",
    ]
    folder.journal.append([{"step": 1, "loss": 2.0}])
    assert call(sync.main, str(folder)) == 2


def test_where_no_server_answers_a_start_logs_offline_and_sync_fails(folder, monkeypatch, caplog):
    import wandb

    server = Server(monkeypatch)

    def init(*, mode: str, **given):
        if mode == "online":
            raise wandb.errors.CommError("no answer")
        return server.init(mode=mode, **given)

    monkeypatch.setattr(wandb, "init", init)
    killed = folder.wandb / "offline-run-1-a/run-a.wandb"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b":W&B\0\0\0")
    board, state = hook(folder, "online"), TrainingState()
    board.on_start(state)
    assert not killed.exists()
    board.on_step(TrainingState(step=1), REPORT)
    assert list(server.steps.values()) == [[1]]
    assert "wandb: no answer; it logs offline; `python -m launch.sync` uploads it later" in caplog.text
    with pytest.raises(wandb.errors.CommError):
        push(folder, TrainConfig())


def test_sync_tells_what_the_server_lacks_and_a_new_project_gets_panels(folder, monkeypatch, capsys):
    import wandb

    server, views = Server(monkeypatch), []
    api = SimpleNamespace(default_entity="us", projects=lambda entity: [SimpleNamespace(name="other")])
    monkeypatch.setattr(wandb, "Api", lambda: api)
    monkeypatch.setattr(sync, "_add_panels", lambda *place: views.append(place))
    run = str(folder)
    save(TrainConfig(run_dir=run), folder.config_file)
    folder.write_ledger(Ledger(rewinds=[{"from": 7, "to": 4}]))
    folder.journal.append([{"step": step, "loss": 2.0} for step in (1, 2, 3)])
    growing = folder.wandb / "offline-run-1-a/run-a.wandb"  # the run goes on
    growing.parent.mkdir(parents=True)
    growing.write_bytes(b":W&B\0\0\0")
    assert call(sync.main, run, "project=paper") == 0
    assert growing.exists()
    (part,) = server.steps
    assert part == f"{folder.wandb_id.read_text()}-r1"
    assert server.steps[part] == [1, 2, 3]
    assert views == [(None, "paper")]
    assert capsys.readouterr().out == f"{run}: https://wandb.example/{part}\n"
    folder.journal.append([{"step": 4, "loss": 2.0}])
    assert call(sync.main, run, "panels=false") == 0
    assert server.steps == {part: [1, 2, 3, 4]}
    assert len(views) == 1

    def no_route(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(wandb, "init", no_route)
    assert call(sync.main, run, "panels=false") == "error: wandb: OSError: no route to host"
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    assert call(sync.main, run) == 2
    assert "error: wandb: nobody is logged in here" in capsys.readouterr().err
    assert call(sync.main, run, "panels=some") == 2


@pytest.mark.full
def test_sync_by_the_real_client_adds_rows_in_their_places(folder, tmp_path):
    run, server = str(folder), WandbServer(projects=("other",))
    save(TrainConfig(run_dir=run), folder.config_file)
    with server.running() as address:
        environment = os.environ | {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path)}
        command = [sys.executable, "-m", "launch.sync", run, "project=paper"]
        for last in (3, 5):
            have = len(folder.records())
            folder.journal.append([{"step": step, "loss": 2.0, "tokens": step} for step in range(have + 1, last + 1)])
            if not have:  # interrupted when the server has some or all rows
                first = subprocess.Popen(command, env=environment, start_new_session=True)
                assert server.has_rows.wait(300)
                os.killpg(first.pid, signal.SIGKILL)
                first.wait()
            said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
            run_id = folder.wandb_id.read_text()
            assert f"{run}: {address}/us/paper/runs/{run_id}" in said.stdout
            assert [(row["_step"], row["tokens"]) for row in server.rows[run_id]] == [
                (n, n) for n in range(1, last + 1)
            ]
            server.projects.append("paper")
    if importlib.util.find_spec("wandb_workspaces"):
        (view,) = server.views
        assert (view["entityName"], view["projectName"], view["displayName"]) == ("us", "paper", "megatron_tn")
        assert '"chartTitle":"Gradient norm"' in view["spec"]
    else:
        assert "pip install -e '.[panels]'" in said.stderr


def test_panels_as_a_view_of_a_wandb_project():
    pytest.importorskip("wandb_workspaces")
    view = workspace("us", "paper")
    assert (view.entity, view.project) == ("us", "paper")
    plots = {plot.title: plot for section in view.sections for plot in section.panels}
    assert (plots["Loss"].x, plots["Loss"].y) == ("tokens", ["loss", "heldout_loss"])
    assert re.fullmatch(plots["Held-out text"].metric_regex, "heldout_bits_per_byte/code")
    assert not re.fullmatch(plots["Held-out text"].metric_regex, "heldout_bits_per_byte_of_others")
    assert plots["Utilisation"].title_y == "% of the rate / 100"
    spec = json.loads(view._to_model().model_dump_json(by_alias=True))["spec"]["section"]["panelBankConfig"]
    assert [section["name"] for section in spec["sections"]] == list(SECTIONS)


def log_steps(folder: str, *parts: tuple[int, int]) -> None:
    """At a terminal where nobody is logged in. After the first part wandb is closed in good order, in the last one the
    process is killed."""
    os.environ.pop("WANDB_API_KEY", None)
    os.environ["HOME"] = folder
    _terminal, other = pty.openpty()
    os.dup2(other, 0)
    run = RunFolder(folder)
    for first, last in parts:
        state = TrainingState(step=first - 1)
        hooks = Journal(run.journal, StepFigures(WORK)), hook(run, "online")
        for one in hooks:
            one.on_start(state)
        for _ in range(first, last + 1):
            state.count(REPORT, samples=1)
            for one in hooks:
                one.on_step(state, REPORT)
        if (first, last) == parts[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        hooks[1].on_stop(state)


def logged(folder: RunFolder) -> list[dict[str, object]]:
    """The rows of the offline copies, in the order of their processes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.wandb.glob(f"offline-run-*/run-{folder.wandb_id.read_text()}.wandb")):
        for message, _ in messages(path.read_bytes()):
            items = Record.FromString(message).history.item
            found.append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return [row for row in found if row]


def settings_in(folder: RunFolder) -> list[dict[str, object]]:
    """The settings of the runs of the offline copies."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in folder.wandb.glob("offline-run-*/*.wandb"):
        for message, _ in messages(path.read_bytes()):
            items = Record.FromString(message).run.config.update
            found.append({item.key: json.loads(item.value_json) for item in items if item.key != "_wandb"})
    return [settings for settings in found if settings]


def test_after_kill_9_the_next_start_tells_what_the_offline_copy_lacks(tmp_path):
    """Steps 1 and 2 reached the disk, 3 and 4 did not: one row for each, over all copies, with all figures."""
    import wandb

    folder = RunFolder(tmp_path)
    (process,) = fork_ranks(1, log_steps, str(tmp_path), (1, 2), (3, 4))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    folder.journal.append([{"step": 4, "start/began": 30.0}])
    folder.journal.superseded.write_text('{"step": 9, "start/began": 10.0}\n{"step": 9, "start/began": 20.0}\n')
    board = hook(folder)
    board.on_start(TrainingState(step=4))
    board.on_step(TrainingState(step=5, optimizer_step=4, tokens=500, samples=20), REPORT)
    texts = [{"prompt": "def ", "text": "f(x): <b>"}]
    board.record(
        {"heldout_loss": 2.0, "heldout_bits_per_byte/code": 1.25, "ranks/slowest": "rank 3", "texts": texts}, 5
    )
    board.record({"memory/allocated_gib": 30.5, "ranks/slowest": "rank 3", "goodput": 0.9, "goodput/starts": 2}, 5)
    board.on_stop(TrainingState(step=5))
    wandb.teardown()  # its process writes the file to the end
    run_id = folder.wandb_id.read_text()
    first, *others = settings_in(folder)  # of the copies whose beginning reached the disk
    assert [first, *others] == [{"optim": {"lr": 1e-3}}] * (1 + len(others))
    newest = max(folder.wandb.glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    newest.rename(f"{newest}-1")  # as wandb names it where two processes began in the same second
    rows = logged(folder)
    assert [(row["_step"], row["loss"], row["perplexity"]) for row in rows] == [
        (step, 2.5, pytest.approx(math.exp(2.5))) for step in range(1, 6)
    ]
    last = rows[-1]
    assert last["tokens_per_second_per_gpu"] == pytest.approx(last["tokens_per_second"] / 2)
    assert last["utilisation"] == pytest.approx(last["model_tflops"] / 400)
    assert last["utilisation_sampled"] == pytest.approx(last["model_tflops"] / 300)
    names = ("lr", "grad_norm", "tokens", "samples", "steps_without_update", "starts")
    assert {name: last[name] for name in names} == {
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 500,
        "samples": 20,
        "steps_without_update": 1,
        "starts": 3,  # with two of superseded steps
    }
    assert last["heldout_perplexity"] == pytest.approx(math.exp(2.0))
    assert last["heldout_bits_per_byte/code"] == 1.25
    assert (last["memory/allocated_gib"], last["goodput"], last["goodput/starts"]) == (30.5, 0.9, 2)
    (page,) = folder.wandb.glob(f"offline-run-*/files/{last['texts/path']}")
    assert page.read_text() == "<pre><b>def </b>f(x): &lt;b&gt;</pre>"
    assert last_step_in(folder.wandb, run_id) == 5


def whole(message: bytes) -> bytes:
    return b"\0" * 4 + len(message).to_bytes(2, "little") + b"\1" + message


@pytest.mark.parametrize("wandb_id", ["", "../../elsewhere", "a\nb"])
def test_damage_of_its_files_and_of_the_journal_costs_no_more_than_what_is_damaged(
    folder, monkeypatch, caplog, wandb_id
):
    from wandb.proto.wandb_internal_pb2 import HistoryItem, HistoryRecord, Record

    server = Server(monkeypatch)
    folder.wandb_id.write_text(wandb_id)
    lines = [b'{"step": 1, "loss": 2.0}', b"[" * 100_000, b'{"step": "two"}', b'{"step": null}', b"\xff", b'{"step": 3']
    folder.journal.path.write_bytes(b"\n".join(lines))
    journal, board, state = Journal(folder.journal, StepFigures(WORK)), hook(folder), TrainingState(step=3)
    for one in (journal, board):
        one.on_start(state)
    board.on_step(TrainingState(step=4), REPORT)
    (run_id,) = server.steps
    assert server.steps[run_id] == [1, 4]
    assert folder.wandb_id.read_text() == run_id != wandb_id
    assert not caplog.records
    items = [HistoryItem(key="_step", value_json=value) for value in ("7", "[" * 20_000, "many")]
    told = [Record(history=HistoryRecord(item=[item])).SerializeToString() for item in items]
    (folder.wandb / f"run-1-{run_id}").mkdir(parents=True)
    file = folder.wandb / f"run-1-{run_id}/run-{run_id}.wandb"
    file.write_bytes(b":W&B\0\0\0" + b"".join(map(whole, [b"\xff\xff\xff", *told, b"x"])))
    (folder.wandb / "offline-run-2").mkdir()
    os.mkfifo(folder.wandb / f"offline-run-2/run-{run_id}.wandb")
    assert last_step_in(folder.wandb, run_id) == 7


def test_a_full_disk_ends_the_copy_and_nothing_else(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        run = RunFolder(tmp_path / "run")
        run.path.mkdir()
        with contextlib.suppress(OSError):
            (tmp_path / "filling").write_bytes(bytes(1 << 20))
        board = hook(run)
        board.on_start(TrainingState())
        assert not run.wandb_id.exists()
        (tmp_path / "filling").unlink()
        board = hook(run)
        board.on_start(TrainingState())
        with contextlib.suppress(OSError):
            (tmp_path / "filling").write_bytes(bytes(1 << 20))
        for step in range(1, 300):
            board.on_step(TrainingState(step=step), REPORT)
        board.on_stop(TrainingState(step=300))
        assert run.wandb_id.read_text()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize("cut", [0, 5, 20, 26, -12, -7, -3])
def test_a_copy_that_was_cut_short_is_read_as_far_as_it_goes_and_ends_there_for_wandb(tmp_path, cut):
    """cut: bytes; below 0: what is left, less than a run's record, so that nothing of the run is in the file."""
    block = 32 * 1024
    records = [b"a" * 10, b"b" * (block - 7 - 24 - 10), b"c" * 20]  # the second leaves 3 bytes, too few for a header
    content = b":W&B\0\0\0"
    for record in records:
        left = block - len(content) % block
        content += b"\0" * left if left < 7 else b""
        content += whole(record)
    assert [message for message, _ in messages(content)] == records
    left = content[: len(content) - cut if cut >= 0 else -cut]
    assert [message for message, _ in messages(left)] == (records if not cut else records[:2] if cut > 0 else [])
    path, online = tmp_path / "offline-run-1-a/run-a.wandb", tmp_path / "run-1-a/run-a.wandb"
    for file in (path, online):
        file.parent.mkdir()
        file.write_bytes(left)
    mend_files(tmp_path)
    assert online.read_bytes() == left
    mended = path.read_bytes() if path.exists() else None
    assert mended == (content if not cut else content[:-27] if cut > 0 else None)
