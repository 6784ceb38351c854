"""`python -m kernels.bench [--output FOLDER] [--only NAMES]`: every operator, on this machine's device.

Each is compared with its fp64 definition, then timed, together with a lower bound (its memory traffic over the
bandwidth of a copy) and other libraries' implementations.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

from kernels.bench import cases, lightning_cases, model_cases, rows
from kernels.bench.measure import copy_bandwidth
from kernels.bench.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for rows.jsonl and attention.png (default: none)")
    parser.add_argument("--only", default="", help="operators whose name contains one of these, separated by commas")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    origin = rows.provenance()
    name = origin["gpu"] or f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {origin['torch']}, Triton {origin['triton']}, copy bandwidth {bandwidth / 1e6:.1f} GB/s")
    report = Report(bandwidth, device)
    for small, case in itertools.chain.from_iterable(m.cases(device) for m in (lightning_cases, cases, model_cases)):
        if any(part in case.operator for part in arguments.only.split(",")):
            report.add(small, case)
    if arguments.output:
        report.write(arguments.output, name)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
