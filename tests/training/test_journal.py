"""The journal: one curve whatever is taken back, and training that goes on whatever the disk does."""

import json
import os

import pytest

from megatron_tn.training.hooks.figures import StepFigures
from megatron_tn.training.hooks.journal import Journal
from megatron_tn.training.journal_file import JournalFile
from megatron_tn.training.run_folder import RunFolder
from megatron_tn.training.state import TrainingState
from tests.helpers.steps import REPORT, WORK
from tests.helpers.waiting import no_waiting


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def run_steps(folder: RunFolder, first: int, last: int, every: int = 1) -> None:
    journal, state = Journal(folder.journal, StepFigures(WORK, every)), TrainingState(step=first - 1)
    journal.on_start(state)
    for _ in range(first, last + 1):
        state.count(REPORT, samples=1)
        journal.on_step(state, REPORT)
    journal.on_stop(state)


def steps_in(folder: RunFolder) -> list[int]:
    lines = folder.journal.path.read_text().splitlines()
    assert lines == [json.dumps(record) for record in folder.records()]
    return [record["step"] for record in folder.records()]


def test_a_rewound_run_leaves_one_clean_curve_and_loses_nothing(folder):
    run_steps(folder, 1, 6)
    with folder.journal.path.open("a") as file:
        file.write('{"step": 7, "lo')  # the process died while it wrote
    run_steps(folder, 5, 8)
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6, 7, 8]
    set_aside = folder.journal.superseded.read_text().splitlines()
    assert [json.loads(line)["step"] for line in set_aside[:2]] == [5, 6]
    assert set_aside[2] == '{"step": 7, "lo'


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": \xff\xfe', b"\0" * 50], ids=["cut", "bytes", "zeros"])
def test_a_last_line_that_a_dying_host_cut_short(folder, torn):
    run_steps(folder, 1, 3)
    with folder.journal.path.open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in folder.records()] == [1, 2, 3]  # whoever reads meanwhile
    run_steps(folder, 4, 5)
    assert steps_in(folder) == [1, 2, 3, 4, 5]
    assert folder.journal.superseded.read_bytes() == torn + b"\n"


def test_a_last_line_without_its_end_stays_a_line(folder):
    run_steps(folder, 1, 3)
    path = folder.journal.path
    path.write_bytes(path.read_bytes()[:-1])
    run_steps(folder, 4, 4)
    assert steps_in(folder) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["path", "superseded"])
def test_a_fifo_is_no_journal_and_training_does_not_wait_for_its_reader(folder, caplog, name):
    run_steps(folder, 1, 3)
    content, file = folder.journal.path.read_bytes(), getattr(folder.journal, name)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with no_waiting():
        run_steps(folder, 2, 4)
        with pytest.raises(OSError, match="not a regular file"):
            JournalFile(file, file).append([{"step": 1}])
    assert len(caplog.records) == 2  # the failed write, and what could not be written
    assert name == "path" or folder.journal.path.read_bytes() == content


def test_every_so_many_steps(folder):
    run_steps(folder, 1, 7, every=3)
    assert steps_in(folder) == [3, 6]


def test_throughput_says_what_it_was_divided_by(folder):
    run_steps(folder, 1, 2)
    record = folder.records()[0]
    assert record["model_tflops"] == pytest.approx(6e9 * record["tokens_per_second"] / 2 / 1e12)
    assert record["utilisation"] == pytest.approx(record["model_tflops"] / record["peak_tflops"])
    assert record["peak_tflops"] == 400.0
    assert "utilisation" not in type(WORK)(6, 1, None).rates(1e3)


def test_a_full_disk_is_said_once_and_the_journal_goes_on_when_it_can(folder, monkeypatch, caplog):
    """Also when half of a line fits, and when the run rewinds meanwhile."""
    real, room = os.write, [10_000]

    def write(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = real(descriptor, content[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    journal, state = Journal(folder.journal, StepFigures(WORK)), TrainingState()
    journal.on_start(state)

    def take(steps: int) -> None:
        for _ in range(steps):
            state.count(REPORT, samples=1)
            journal.on_step(state, REPORT)

    take(2)
    room[0] = 100  # less than a record
    take(3)
    assert steps_in(folder) == [1, 2]
    state.become(TrainingState(step=4))
    journal.on_rewind(state)
    take(2)
    assert steps_in(folder) == [1, 2]
    room[0] = 10_000
    take(1)
    assert steps_in(folder) == [1, 2, 3, 4, 5, 6, 7]
    room[0] = 0
    take(1)
    journal.on_stop(state)
    words = [record.message.partition("log.jsonl ")[2] or record.message for record in caplog.records]
    assert words[:2] == ["cannot be written: No space left on device; training goes on", words[1]]
    assert "can be written again" in words[1]
    assert "1 records could not be written" in words[3]
