"""`python -m kernels.bench`: correctness first, then time against the memory's floor, on the device there is."""

import importlib.util
import itertools
import sys

import torch

from kernels.bench import lightning_cases
from kernels.bench.cases import Case, cases
from kernels.bench.measure import MIB, copy_bandwidth, extra_memory, milliseconds

# Relative error in norm that a result may have before its speed is worth printing.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
HEADER = f"{'operator':<48}{'error':>9}  {'pass':<7}{'ms':>9}{'floor':>9}{'ratio':>7}{'extra MiB':>11}"


def report(small: Case, case: Case, bandwidth: float, device: torch.device) -> bool:
    """Print a case's rows, or that it is wrong; returns whether it is right. bandwidth: bytes a millisecond."""
    error = small.worst_error()
    limit = LARGEST_ERROR[small.inputs[0].dtype]
    if not error <= limit:
        print(f"{case.name:<48}{error:>9.1e}  WRONG: the largest error allowed is {limit}; not timed")
        return False
    floors = (case.forward_bytes / bandwidth, (case.forward_bytes + case.backward_bytes) / bandwidth)
    outputs = sum(x.nbytes for x in case.gradients) / MIB
    _rows(case.name, f"{error:.1e}", case.forward, case.both, floors, outputs, device)
    for peer in case.peers:

        def forward(peer=peer):
            return peer.function(*case.inputs)

        def both(forward=forward):
            return torch.autograd.grad(forward(), case.inputs, case.gradients[0])

        try:
            _rows(f"  {peer.name}", "", forward, both, floors, outputs, device)
        except (RuntimeError, TypeError) as error:
            print(f"  {peer.name}: does not run: {str(error).splitlines()[0][:90]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _rows(name: str, error: str, forward, both, floors: tuple[float, float], outputs: float, device) -> None:
    """Two rows. The memory is what stands at the peak beside the inputs and the outputs (`outputs` MiB)."""
    for label, function, floor in (("fwd", forward, floors[0]), ("fwd+bwd", both, floors[1])):
        time = milliseconds(function, device)
        memory = extra_memory(function, device)
        shown = "-" if memory is None else f"{memory - outputs:.0f}"
        print(f"{name:<48}{error:>9}  {label:<7}{time:>9.3f}{floor:>9.3f}{time / floor:>7.2f}{shown:>11}", flush=True)


def main() -> int:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    triton = "no Triton"
    if importlib.util.find_spec("triton"):
        import triton as module

        triton = f"Triton {module.__version__}"
    print(f"{name}, torch {torch.__version__}, {triton}, copy bandwidth {bandwidth / 1e6:.1f} GB/s\n{HEADER}")
    every_case = itertools.chain(cases(device), lightning_cases.cases(device))
    right = [report(small, case, bandwidth, device) for small, case in every_case]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
