"""kill -9 at any point, of the run or of one of its workers: the same command then gives the bytes of a run that nobody
disturbed, nothing lost and nothing doubled."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.config import compose
from data_pipeline.run import run
from tests.data_pipeline.corpus import plant
from tests.data_pipeline.test_pipeline import ROOT, arguments, fingerprint

SLOW = "tasks=6"  # more, shorter tasks: more places to be killed in


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("corpus") / "text"
    plant(source, good=60)
    return source


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed") / "data"
    run(compose(arguments(source, output, SLOW)))
    return fingerprint(output)


@contextlib.contextmanager
def started(source, output, *more, stderr=subprocess.DEVNULL):
    """The run in a process group of its own, of which nothing is left at the end."""
    command = [sys.executable, "-m", "data_pipeline.run", *arguments(source, output, "workers=2", *more)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=stderr, text=True)
    try:
        yield process
    finally:
        deadline = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:  # a worker that is not gone yet keeps its files from being cleared
                os.killpg(process.pid, signal.SIGKILL)
                process.poll()
                time.sleep(0.01)
        process.wait()


def workers(process: subprocess.Popen) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


def wait_for_stage(output: Path, process: subprocess.Popen, stage: str, sign: str = "logs") -> None:
    """Until its first task has begun, or has ended: sign `completions`, when others are under way."""
    deadline = time.monotonic() + 60
    while not list(output.glob(f"work/stages/*_{stage}/{sign}/*")) and process.poll() is None:
        assert time.monotonic() < deadline, "the stage never began"
        time.sleep(0.002)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_killed_in_one_stage_after_another_and_run_again_it_gives_the_same_bytes(source, undisturbed, tmp_path):
    """A worker, all processes, a worker again, the run alone."""
    output = tmp_path / "data"
    assert kill_a_worker(source, output, "rules") == 1
    with started(source, output, SLOW) as process:
        wait_for_stage(output, process, "near_pairs")
        os.killpg(process.pid, signal.SIGKILL)
    if kill_a_worker(source, output, "shards") == 0:  # the worker had just become idle for good
        assert fingerprint(output) == undisturbed
        return
    with started(source, output, SLOW) as process:
        wait_for_stage(output, process, "shards", "completions")
        left = workers(process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while alive := [pid for pid in left if Path(f"/proc/{pid}/cmdline").exists() and not zombie(pid)]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)
    assert not (output / "report.json").exists()
    run(compose(arguments(source, output, SLOW)))
    assert fingerprint(output) == undisturbed


def kill_a_worker(source: Path, output: Path, stage: str) -> int:
    """The exit code of a run of which a worker is killed in `stage`. It ends with one line; a pool that only replaces
    the worker would wait for its task for ever."""
    with started(source, output, SLOW, stderr=subprocess.PIPE) as process:
        wait_for_stage(output, process, stage)
        os.kill(random.choice(workers(process)), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    if process.returncode:
        line = errors.strip().splitlines()[-1]
        assert line.startswith(f"stage {stage}: a worker was killed (is the memory enough for workers=2?); task")
    return process.returncode


def zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    return True


def disturb(source: Path, output: Path, seed: int) -> str:
    """Kills the run, its workers or one of them after a random time; returns what was killed, `complete` when the run
    was faster."""
    generator = random.Random(seed)
    with started(source, output, SLOW, stderr=subprocess.PIPE) as process:
        # Importing takes the first second, and the stages less than another.
        try:
            process.wait(timeout=generator.uniform(0.6, 2.2))
            assert process.returncode == 0, process.stderr.read()
            return "complete"
        except subprocess.TimeoutExpired:
            children = workers(process)
            kind = generator.choice(["all", "run", "worker"] if children else ["all", "run"])
        if kind == "worker":
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(children), signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
            assert process.returncode in (0, 1), errors
        elif kind == "run":  # its workers live on for a moment, into the next run
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return kind


@pytest.mark.full  # the test above kills the run in its stages
def test_killed_at_random_points_the_bytes_are_the_same(source, undisturbed, tmp_path):
    kills = 4
    for number in range(6):
        output, done = tmp_path / f"data{number}", 0
        for attempt in range(3 * kills):
            kind = disturb(source, output, seed=1000 * number + attempt)
            print(number, attempt, kind)
            done += kind != "complete"
            if done == kills or kind == "complete":
                break
        assert done
        run(compose(arguments(source, output, SLOW)))
        assert fingerprint(output) == undisturbed
        leftover = [path for path in output.rglob("*.tmp") if "work" not in path.relative_to(output).parts]
        assert not leftover
