"""Runs the benchmark cases and writes a table to the terminal, rows.jsonl, and a plot."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kernels.bench import rows
from kernels.bench.cases import Case
from kernels.bench.measure import MIB, copy_milliseconds, extra_memory, milliseconds
from kernels.bench.picture import draw

# Largest allowed relative error in norm, by input type; ROUNDINGS times as much for a chained case.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
ROUNDINGS = 4
FORWARD, BOTH = "forward", "forward + backward"
COLUMNS = f"{'':<42}{'error':>9}  {'pass':<20}{'ms':>9}{'floor':>9}{'ratio':>7}{'copies':>9}{'extra MiB':>11}"


@dataclasses.dataclass(frozen=True)
class Time:
    """One time, in ms, of `passes` (FORWARD or BOTH) of an operator.

    by: the peer's name; empty for this package's operator.
    floor_ms: lower bound: time of the memory traffic or, in cases that have them, of the matrix products.
    copies_ms: time of copies of the same number of bytes, one per pass; above floor_ms for small tensors, because of
        launch overhead. None for cases with matrix products.
    extra_mib: peak memory beyond inputs, outputs and gradients; None on a CPU.
    error: relative, against fp64; None for a peer.
    length: positions per row, where the plot shows the case.
    """

    operator: str
    shape: str
    by: str
    passes: str
    milliseconds: float
    floor_ms: float
    copies_ms: float | None
    extra_mib: float | None
    error: float | None
    length: int | None

    def row(self) -> dict:
        """The time as a row of rows.jsonl (rows.py), with all fields that are neither None nor empty."""
        extras = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, "")}
        return rows.row(f"{self.operator}, {self.passes}", "ms", extras.pop("milliseconds"), **extras)


class Report:
    """Measures cases one by one and prints a table per operator.

    bandwidth: bytes per millisecond of a large copy on `device`. times: all measurements so far. wrong: number of cases
    not timed because their results were wrong.
    """

    def __init__(self, bandwidth: float, device: torch.device):
        self.bandwidth, self.device = bandwidth, device
        self.times: list[Time] = []
        self.wrong = 0
        self.title = ""

    def add(self, small: Case, case: Case) -> None:
        """Time `case` and its peers, unless `small`, of the same widths and type, has wrong results."""
        if case.operator != self.title:
            self.title = case.operator
            print(f"\n{self.title}\n{COLUMNS}")
        error = small.worst_error()
        limit = LARGEST_ERROR[small.inputs[0].dtype] * (ROUNDINGS if case.chained else 1)
        if not error <= limit:
            self.wrong += 1
            print(f"{case.shape:<42}{error:>9.1e}  WRONG: the largest error allowed is {limit}; not timed")
            return
        floors = self._floors(case)
        self._time(case, floors, case.forward, case.both, error=error)
        for peer in case.peers:

            def forward(peer=peer):
                return peer.function(*case.inputs)

            def both(forward=forward):
                return torch.autograd.grad(forward(), case.leaves, case.gradients)

            try:
                self._time(case, floors, forward, both, by=peer.name)
            except Exception as failure:  # a peer may raise anything; the other cases are still timed
                print(f"  {peer.name}: does not run: {(str(failure).splitlines() or [''])[0][:90]}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def rows(self) -> Iterator[dict]:
        """The rows of all times, and of the copy bandwidth behind their lower bounds."""
        yield rows.row("device copy", "GB/s", self.bandwidth / 1e6)
        for time in self.times:
            yield time.row()

    def write(self, folder: Path, device: str) -> None:
        """Write (or replace) rows.jsonl and, if several lengths were measured and matplotlib is installed,
        attention.png. device: device name for the plot's title."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").unlink(missing_ok=True)
        rows.append(folder / "rows.jsonl", self.rows())
        written = ["rows.jsonl"]
        lines: dict[str, list[tuple[int, float]]] = {}
        for time in self.times:
            if time.length and time.passes == BOTH:
                tokens = int(time.shape.split()[1]) * time.length
                line = lines.setdefault(time.by or "lightning attention", [])
                line.append((time.length, 1e6 * time.milliseconds / tokens))
        if draw(lines, folder / "attention.png", title=f"Attention, 32 heads of width 128, bf16, {device}"):
            written.append("attention.png")
        print(f"\nwritten to {folder}: {', '.join(written)}")

    def _floors(self, case: Case) -> dict[str, tuple[float, float | None]]:
        """passes -> (lower bound, time of copies), in ms. Cases with matrix products have no forward lower bound."""
        if case.products:
            return {BOTH: (milliseconds(case.products, self.device), None)}
        sizes = (case.forward_bytes, case.backward_bytes)
        copies = [copy_milliseconds(size, self.device) for size in sizes]
        return {
            FORWARD: (sizes[0] / self.bandwidth, copies[0]),
            BOTH: (sum(sizes) / self.bandwidth, sum(copies)),
        }

    def _time(
        self,
        case: Case,
        floors: dict[str, tuple[float, float | None]],
        forward: Callable[[], object],
        both: Callable[[], object],
        *,
        by: str = "",
        error: float | None = None,
    ) -> None:
        functions = {FORWARD: (forward, case.written_bytes)}
        if case.gradients:
            functions[BOTH] = (both, sum(x.nbytes for x in case.leaves))
        for passes, (function, results) in functions.items():
            if passes not in floors:
                continue
            memory = extra_memory(function, self.device)
            time = Time(
                operator=case.operator,
                shape=case.shape,
                by=by,
                passes=passes,
                milliseconds=milliseconds(function, self.device),
                floor_ms=floors[passes][0],
                copies_ms=floors[passes][1],
                extra_mib=None if memory is None else memory - (0 if case.in_place else results / MIB),
                error=error,
                length=case.length,
            )
            self.times.append(time)
            _print(time)


def _print(time: Time) -> None:
    name = f"  {time.by}" if time.by else time.shape
    error = "" if time.error is None else f"{time.error:.1e}"
    copies = "-" if time.copies_ms is None else f"{time.copies_ms:.3f}"
    extra = "-" if time.extra_mib is None else f"{time.extra_mib:.0f}"
    print(
        f"{name:<42}{error:>9}  {time.passes:<20}{time.milliseconds:>9.3f}{time.floor_ms:>9.3f}"
        f"{time.milliseconds / time.floor_ms:>7.2f}{copies:>9}{extra:>11}",
        flush=True,
    )
