"""One measurement, and its forms as a JSON row and as a table row."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from kernels.bench import rows
from megatron_tn.cli.tables import table_console
from megatron_tn.config import BenchmarkConfig
from megatron_tn.planning.search import engine_word

STEP, WITH_OPTIMIZER, LOOP = "step", "step + optimizer", "training loop"


@dataclasses.dataclass(frozen=True)
class Result:
    """milliseconds: per step, on one rank. tokens: per step, over all ranks. name: STEP is forward, loss and backward;
    WITH_OPTIMIZER adds the optimizer step; LOOP is the training command, with data and logging."""

    name: str
    model: str
    layout: dict[str, Any]
    tokens: int
    milliseconds: float
    parameters: int
    sampled_tflops: float
    datasheet_tflops: float | None
    peak_gib: float

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.tokens / self.milliseconds

    @property
    def model_tflops(self) -> float:
        """TFLOP/s per GPU at 6 FLOPs per parameter and token; recomputation is not counted."""
        return 6 * self.parameters * self.tokens_per_second / self.layout["gpus"] / 1e12

    @property
    def utilisation_sampled(self) -> float:
        return self.model_tflops / self.sampled_tflops

    @property
    def utilisation_datasheet(self) -> float | None:
        return self.model_tflops / self.datasheet_tflops if self.datasheet_tflops else None

    def row(self) -> dict[str, Any]:
        """A JSON row, see kernels/bench/rows.py."""
        return rows.row(
            self.name,
            "ms",
            self.milliseconds,
            model=self.model,
            **self.layout,
            tokens=self.tokens,
            tokens_per_second=self.tokens_per_second,
            parameters=self.parameters,
            model_tflops=self.model_tflops,
            utilisation_sampled=self.utilisation_sampled,
            sampled_tflops=self.sampled_tflops,
            utilisation_datasheet=self.utilisation_datasheet,
            datasheet_tflops=self.datasheet_tflops,
            peak_gib=self.peak_gib,
        )


def layout_of(config: BenchmarkConfig, gpus: int) -> dict[str, Any]:
    """The settings that identify a row, as flat values. gpus: number of processes, one per GPU."""
    engine, parallel, data = config.engine, config.parallel, config.data
    every = f", every {engine.recompute_every} blocks" if engine.recompute_every > 1 else ""
    return {
        "engine": engine_word(engine),
        "layout": f"tp {parallel.tp}, cp {parallel.cp}, dp {gpus // (parallel.tp * parallel.cp)}"
        + (", sequence parallel" if parallel.sequence_parallel else "")
        + (", Muon" if config.optim.name == "muon" else "")
        + (", heads apart" if config.optim.heads_apart else "")
        + (", fp8 products" if engine.products == "fp8" else ""),
        "recompute": f"{engine.recompute}{every}",
        "replay": "CUDA graph" if engine.cuda_graph else engine.compile,
        "gpus": gpus,
        "sequence_length": data.sequence_length,
        "micro_batch": data.micro_batch,
        "global_batch": data.global_batch,
    }


def peer_layout(config: BenchmarkConfig, compiled: str) -> dict[str, Any]:
    """`layout_of` for a peer model on one GPU without optimizer. compiled: text for the key "replay"."""
    return layout_of(config, 1) | {
        "engine": "none",
        "layout": "tp 1, cp 1, dp 1",
        "recompute": "none",
        "replay": compiled,
    }


def show(results: Sequence[Result]) -> None:
    shares = ("of the sampled rate", "of the datasheet's")
    table = Table("model", "what", "N", "tokens a step", "ms", "tokens/s", *shares, "peak GiB")
    for found in results:
        of_datasheet = found.utilisation_datasheet
        table.add_row(
            found.model,
            found.name,
            str(found.layout["sequence_length"]),
            str(found.tokens),
            f"{found.milliseconds:.1f}",
            f"{found.tokens_per_second:,.0f}",
            f"{100 * found.utilisation_sampled:.1f} % of {found.sampled_tflops:.0f}",
            f"{100 * of_datasheet:.1f} % of {found.datasheet_tflops:.0f}" if of_datasheet else "not known",
            f"{found.peak_gib:.1f}",
        )
    table_console().print(table)
