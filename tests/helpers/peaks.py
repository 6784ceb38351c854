"""What reading costs, measured in a process of its own (Linux: peaks are those of /proc)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# ru_maxrss would not do: a process begins with that of the one that started it.
CODE = """
import json, os, sys, time
from pathlib import Path
from data_pipeline.readers import ReadSources
from data_pipeline.pages.client import EXTRACTOR
from tests.data_pipeline.source_factory import source

def read(folder, options):
    step = ReadSources({"s": source(folder, **options)}, Path(folder, "quarantine"))
    return sum(1 for document in step.run())

def memory(pid, name):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

for small, large, options in json.loads(sys.argv[1]):
    read(small, options)  # what all reading needs: modules, buffers, the extractor
    processes = [os.getpid(), *([EXTRACTOR._process.pid] if EXTRACTOR._process else [])]
    for pid in processes:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    before = sum(memory(pid, "VmRSS") for pid in processes)
    began = time.perf_counter()
    documents = read(large, options)
    seconds = time.perf_counter() - began
    print(json.dumps([documents, seconds, sum(memory(pid, "VmHWM") for pid in processes) - before]))
"""


class Cost(NamedTuple):
    """Documents read, seconds, and bytes by which the peaks of the reader and of its extractor grew, added up."""

    documents: int
    seconds: float
    grown: int


def costs_of_reading(*cases: tuple[Path, Path, dict]) -> list[Cost]:
    """Of each case's second folder, after its first one was read by the same settings of a source; in one process."""
    words = json.dumps([(str(small), str(large), options) for small, large, options in cases])
    command = [sys.executable, "-c", CODE, words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [Cost(*json.loads(line)) for line in done.stdout.splitlines()]
