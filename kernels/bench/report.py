"""What a benchmark hands over: tables on the terminal, rows as JSON, and time against length as a picture."""

import dataclasses
import json
from pathlib import Path

import torch

from kernels.bench.cases import Case
from kernels.bench.measure import MIB, copy_milliseconds, extra_memory, milliseconds

# Relative error in norm that a result may have before its speed is worth printing.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
ROUNDINGS = 4  # times as much for operators in a row
COLUMNS = f"{'':<42}{'error':>9}  {'pass':<9}{'ms':>9}{'floor':>9}{'ratio':>7}{'copies':>9}{'extra MiB':>11}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One time. floor_ms: what the memory, or products alone, take. copies_ms: what copies of as many bytes take, one
    a pass; of small tensors more than the floor, since a copy starts and drains as well; None beside products.
    extra_mib: at the peak, beside inputs, outputs and gradients; None on a CPU. by: whose kernel, empty for this
    package's."""

    operator: str
    shape: str
    by: str
    part: str
    milliseconds: float
    floor_ms: float
    copies_ms: float | None
    extra_mib: float | None
    error: float | None
    length: int | None


class Report:
    """Measures cases one by one and prints a table for every operator. bandwidth: bytes a millisecond of a copy."""

    def __init__(self, bandwidth: float, device: torch.device):
        self.bandwidth, self.device = bandwidth, device
        self.rows: list[Row] = []
        self.wrong = 0
        self.title = ""

    def add(self, small: Case, case: Case) -> None:
        """Time `case` and its peers, unless `small`, of the same kind, is wrong."""
        if case.operator != self.title:
            self.title = case.operator
            print(f"\n{self.title}\n{COLUMNS}")
        error = small.worst_error()
        limit = LARGEST_ERROR[small.inputs[0].dtype] * (ROUNDINGS if case.chained else 1)
        if not error <= limit:
            self.wrong += 1
            print(f"{case.shape:<42}{error:>9.1e}  WRONG: the largest error allowed is {limit}; not timed")
            return
        floors = [case.forward_bytes / self.bandwidth, (case.forward_bytes + case.backward_bytes) / self.bandwidth]
        copies = [None, None]
        if case.products:
            floors = [None, milliseconds(case.products, self.device)]
        else:
            copies = [copy_milliseconds(size, self.device) for size in (case.forward_bytes, case.backward_bytes)]
            copies[1] += copies[0]
        self._time(case, "", error, case.forward, case.both, floors, copies)
        for peer in case.peers:

            def forward(peer=peer):
                return peer.function(*case.inputs)

            def both(forward=forward):
                return torch.autograd.grad(forward(), case.leaves, case.gradients)

            try:
                self._time(case, peer.name, None, forward, both, floors, copies)
            except Exception as failure:  # others' packages fail in many ways; the table goes on
                print(f"  {peer.name}: does not run: {(str(failure).splitlines() or [''])[0][:90]}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _time(
        self, case: Case, by: str, error: float | None, forward, both,
        floors: list[float | None], copies: list[float | None],
    ) -> None:  # fmt: skip
        outputs = sum(x.nbytes for x in (case.gradients if case.output_bytes is None else ())) + (
            case.output_bytes or 0
        )
        parts = [("forward", forward, floors[0], copies[0], outputs)]
        if case.gradients:
            parts.append(("both", both, floors[1], copies[1], sum(x.nbytes for x in case.leaves)))
        for part, function, floor, copy, results in parts:
            if floor is None:
                continue
            memory = extra_memory(function, self.device)
            results = 0 if case.in_place else results
            row = Row(
                case.operator,
                case.shape,
                by,
                part,
                milliseconds(function, self.device),
                floor,
                copy,
                None if memory is None else memory - results / MIB,
                error,
                case.length,
            )
            self.rows.append(row)
            name, shown = f"  {by}" if by else case.shape, "-" if row.extra_mib is None else f"{row.extra_mib:.0f}"
            exact, copied = "" if error is None else f"{error:.1e}", "-" if copy is None else f"{copy:.3f}"
            print(
                f"{name:<42}{exact:>9}  {part:<9}{row.milliseconds:>9.3f}{floor:>9.3f}"
                f"{row.milliseconds / floor:>7.2f}{copied:>9}{shown:>11}",
                flush=True,
            )

    def write(self, folder: Path, machine: dict) -> None:
        """rows.json, and attention.png where there are lengths to plot and matplotlib is installed."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(row) for row in self.rows]
        (folder / "rows.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        written = ["rows.json"]
        if plot(self.rows, folder / "attention.png", machine["device"]):
            written.append("attention.png")
        print(f"\nwritten to {folder}: {', '.join(written)}")


def plot(rows: list[Row], path: Path, device: str) -> bool:
    """Time a token against the length of a row, forward + backward, of every attention; False if nothing was drawn."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.length and row.part == "both":
            batch = int(row.shape.split()[1])
            lines.setdefault(row.by or "lightning attention", []).append(
                (row.length, 1e6 * row.milliseconds / (batch * row.length))
            )
    if not any(len(line) > 1 for line in lines.values()):
        return False
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib); rows.json has what it needs")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, line in lines.items():
        lengths, times = zip(*sorted(line), strict=True)
        axes.plot(lengths, times, marker="o", linewidth=2.5 if name == "lightning attention" else 1.2, label=name)
    ticks = sorted({length for line in lines.values() for length, _ in line})
    axes.set(xscale="log", yscale="log", xlabel="positions in a row", ylabel="forward + backward, ns a token")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(f"Attention, 32 heads of width 128, bf16, {device}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
