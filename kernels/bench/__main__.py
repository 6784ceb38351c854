"""`python -m kernels.bench`: correctness first, then time against the memory's floor, on the device there is."""

import sys

import torch

from kernels.bench.cases import Case, cases
from kernels.bench.measure import copy_bandwidth, extra_memory, milliseconds

# Relative error in norm that a result may have before its speed is worth printing.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
HEADER = f"{'operator':<44}{'error':>9}  {'pass':<7}{'ms':>9}{'floor':>9}{'ratio':>7}{'extra MiB':>11}"


def report(small: Case, case: Case, bandwidth: float, device: torch.device) -> bool:
    """Print a case's rows, or that it is wrong; returns whether it is right. bandwidth: bytes a millisecond."""
    error = small.worst_error()
    limit = LARGEST_ERROR[small.inputs[0].dtype]
    if not error <= limit:
        print(f"{case.name:<44}{error:>9.1e}  WRONG: the largest error allowed is {limit}; not timed")
        return False
    both_bytes = case.forward_bytes + case.backward_bytes
    for name, function, floor in (
        ("fwd", case.forward, case.forward_bytes / bandwidth),
        ("fwd+bwd", case.both, both_bytes / bandwidth),
    ):
        time = milliseconds(function, device)
        memory = extra_memory(function, device)
        shown = "-" if memory is None else f"{memory:.0f}"
        print(f"{case.name:<44}{error:>9.1e}  {name:<7}{time:>9.3f}{floor:>9.3f}{time / floor:>7.2f}{shown:>11}")
    return True


def main() -> int:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e6:.1f} GB/s\n{HEADER}")
    right = [report(small, case, bandwidth, device) for small, case in cases(device)]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
