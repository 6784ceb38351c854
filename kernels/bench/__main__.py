"""`python -m kernels.bench [--output FOLDER]`: correctness first, then time against the memory's floor and against
peers, on the device there is."""

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path

import torch

from kernels.bench import cases, lightning_cases, model_cases
from kernels.bench.measure import copy_bandwidth
from kernels.bench.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for rows.json and attention.png (default: none)")
    parser.add_argument("--only", default="", help="operators whose name holds this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    triton = "none"
    if importlib.util.find_spec("triton"):
        import triton as module

        triton = module.__version__
    machine = {"device": name, "torch": torch.__version__, "triton": triton, "copy_gb_per_s": bandwidth / 1e6}
    print(f"{name}, torch {torch.__version__}, Triton {triton}, copy bandwidth {bandwidth / 1e6:.1f} GB/s")
    report = Report(bandwidth, device)
    for small, case in itertools.chain.from_iterable(m.cases(device) for m in (lightning_cases, cases, model_cases)):
        if arguments.only in case.operator:
            report.add(small, case)
    if arguments.output:
        report.write(arguments.output, machine)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
