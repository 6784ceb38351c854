"""TensorBoard as a copy of the journal: one whole curve after a rewind and a restart; it may fail."""

import sys

import pytest

from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.hooks.tensorboard import TensorBoard
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from megatron_tn.training.step import skipped_step
from tests.helpers.steps import REPORT, WORK


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def board(folder: RunFolder) -> TensorBoard:
    return TensorBoard(folder, {"seed": 3}, StepFigures(WORK))


def test_one_curve_after_a_rewind_and_a_restart(folder):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    state = TrainingState()

    def take(hooks, losses) -> None:
        for loss in losses:
            state.count(REPORT, samples=4)
            for hook in hooks:
                hook.on_step(state, REPORT._replace(loss=loss))

    journal = Journal(folder.journal, StepFigures(WORK))
    hooks = [journal, board(folder)]
    for hook in hooks:
        hook.on_start(state)
    take(hooks, [6.0, 5.0, 4.0, 9.0, 9.0, 9.0])
    for hook in hooks:
        hook.record({"heldout_loss": 8.0}, 6)  # of steps that are taken back, and not repeated
    state.become(TrainingState(step=3, optimizer_step=3, rewinds=[{"from": 6, "to": 3}]))
    for hook in hooks:
        hook.on_rewind(state)
    take(hooks, [3.0, 2.0])
    killed, hooks = hooks[1], [journal, board(folder)]  # the first board is never closed
    killed._writer.flush()
    for hook in hooks:
        hook.on_start(state)
    state.count(skipped_step(1e-3), samples=4)
    for hook in hooks:
        hook.on_step(state, skipped_step(1e-3))
        hook.record({"texts": [{"prompt": "def ", "text": "f(x):\n  `<b>"}], "heldout_loss": 2.5}, 6)
        hook.on_stop(state)
    found = reading.EventAccumulator(str(folder.tensorboard))
    found.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in found.Scalars(tag)]

    assert curve("loss") == [(1, 6.0), (2, 5.0), (3, 4.0), (4, 3.0), (5, 2.0)]
    assert curve("heldout_loss") == [(6, 2.5)]
    assert curve("steps_without_update")[-2:] == [(5, 0.0), (6, 1.0)]
    assert curve("tokens_per_second_per_gpu")[0][1] == pytest.approx(curve("tokens_per_second")[0][1] / 2)
    times = [record["time"] for record in folder.records("loss")]
    assert [event.wall_time for event in found.Scalars("loss")] == times  # of the steps, not of the restart
    (text,) = found.Tensors("texts/text_summary")
    assert text.tensor_proto.string_val == [b"    def f(x):\n      `<b>"]
    (settings,) = found.Tensors("config/text_summary")
    assert b'"seed": 3' in settings.tensor_proto.string_val[0]


def test_it_never_stops_training(folder, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    folder.tensorboard.write_text("a file in the place of the folder")
    one = board(folder)
    one.on_start(TrainingState())
    one.on_step(TrainingState(step=1), REPORT)
    one.on_stop(TrainingState(step=1))
    (warning,) = caplog.messages
    assert warning.startswith("TensorBoard: FileExistsError")
    assert warning.endswith("going on without it (log.jsonl has everything)")


def test_without_the_extra_it_names_it(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board(folder).on_start(TrainingState())
    assert "TensorBoard: ImportError: it needs the extra tensorboard, pip install -e '.[tensorboard]'" in caplog.text
