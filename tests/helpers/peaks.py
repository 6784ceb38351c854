"""What reading costs, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CODE = """
import json, resource, sys, time
from pathlib import Path
from data_pipeline.readers import ReadSources
from data_pipeline.readers.html import EXTRACTOR
from tests.data_pipeline.test_readers import source

def read(folder, options):
    step = ReadSources({"s": source(folder, **options)}, Path(folder, "quarantine"))
    return sum(1 for document in step.run())

small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
read(small, options)  # what all reading needs: modules, buffers
EXTRACTOR.close()
started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
documents = read(large, options)
seconds = time.perf_counter() - began
EXTRACTOR.close()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
grown += resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss - started
print(json.dumps([documents, seconds, grown * 1024]))
"""


class Cost(NamedTuple):
    """Documents read, seconds, and bytes by which the peaks of the reader and of its extractor grew, added up."""

    documents: int
    seconds: float
    grown: int


def cost_of_reading(small: Path, large: Path, **options: object) -> Cost:
    """Of the folder `large`, after the folder `small` was read by the same settings of a source."""
    command = [sys.executable, "-c", CODE, str(small), str(large), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return Cost(*json.loads(done.stdout.splitlines()[-1]))
