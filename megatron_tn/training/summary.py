"""What a run says at its beginning and at its end: a table each, for people. Rank 0 prints them."""

import logging
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_tn.config import TrainConfig, storable
from megatron_tn.optim.schedule import batch_of_step
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.planning.host import counted
from megatron_tn.training.goodput import goodput_of
from megatron_tn.training.run_folder import RunFolder

log = logging.getLogger(__name__)


def show_start(
    config: TrainConfig,
    context: ParallelContext,
    device: torch.device,
    *,
    parameters: int,
    kernels: str,
    step: int,
    epoch_samples: int,
) -> None:
    """parameters: of the model. kernels: what operators run with. step: steps done already. epoch_samples: sequences in
    one pass over the data."""
    data, emulated = config.data, config.engine.products == "fp8" and device.type == "cpu"
    first, _ = batch_of_step(step, data.global_batch, config.schedule)
    last, size = batch_of_step(config.last_step - 1, data.global_batch, config.schedule)
    sequences = max(last + size - first, 0)
    dp, cp, tp = context.dp.size, context.cp.size, context.tp.size
    _print(
        f"training {config.model.name}",
        {
            "device": _device(device, context.world_size),
            "layout": f"{counted(context.world_size, 'process')}: tp {tp} x cp {cp} x dp {dp}",
            "engine": engine_in_words(config),
            "kernels": kernels + ("; fp8 products are emulated" if emulated else ""),
            "parameters": f"{parameters:,}",
            "tokens a step": f"{data.global_batch * data.sequence_length:,} = {data.global_batch} sequences of "
            f"{data.sequence_length}, {data.micro_batch} at a time",
            "steps": f"{step + 1:,} to {config.last_step:,}: {sequences * data.sequence_length:,} tokens, "
            f"{sequences / max(epoch_samples, 1):.2f} epochs of {storable(data.manifest)}",
            "run folder": config.run_dir,
        },
    )


def engine_in_words(config: TrainConfig) -> str:
    """Engine, precision, products, recomputation and optimizer of a run, for tables."""
    engine = config.engine
    zero = f" ZeRO {engine.zero_stage}" if engine.name == "deepspeed" else ""
    fp8 = ", fp8 products" if engine.products == "fp8" else ""
    return f"{engine.name}{zero}, {engine.precision}{fp8}, recompute {engine.recompute}, {config.optim.name}"


def _device(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} a process"


def figures_of(folder: RunFolder) -> dict[str, Any]:
    """step, tokens, loss (mean over the last tenth of the records), tokens_per_second (median), heldout_loss and
    heldout_bits_per_byte of a run, by its journal; those that it does not have are left out. NaN where the loss was."""
    records = folder.records("loss")
    found: dict[str, Any] = {}
    if records:
        losses = [record["loss"] for record in records[-max(len(records) // 10, 1) :]]
        tail = [math.nan if loss is None else loss for loss in losses]
        found["step"], found["tokens"] = records[-1]["step"], records[-1]["tokens"]
        found["loss"] = statistics.fmean(tail)
        found["tokens_per_second"] = statistics.median(record["tokens_per_second"] for record in records)
    for figure in ("heldout_loss", "heldout_bits_per_byte"):
        if held_out := folder.records(figure):
            value = held_out[-1][figure]
            found[figure] = math.nan if value is None else value
    return found


def show_end(config: TrainConfig, folder: RunFolder, state: str) -> None:
    """state: of status.json, "finished" or "preempted"."""
    found, goodput, run = figures_of(folder), goodput_of(folder), config.run_dir
    rows = {
        "steps": f"{found.get('step', 0):,} of {config.schedule.steps:,}",
        "loss": f"{found['loss']:.3f} nats a token, mean of the last tenth" if "loss" in found else "",
        "held-out loss": f"{found['heldout_loss']:.3f}" if "heldout_loss" in found else "",
        "tokens/s": f"{found['tokens_per_second']:,.0f}, median" if "loss" in found else "",
        "goodput": goodput.in_words() if goodput else "",
    }
    lines = (
        f"{run} holds log.jsonl, loss.png, checkpoints/ and tokenizer.json. Next:",
        f'  python -m megatron_tn.generate checkpoint={shlex.quote(run)} prompt="..."',
        f"  python -m megatron_tn.plot {shlex.quote(run)}",
        f"  python -m launch.report {shlex.quote(run)}",
    )
    _print(f"{state}: {config.model.name}", {name: text for name, text in rows.items() if text}, lines)


def _print(title: str, rows: Mapping[str, str], lines: Iterable[str] = ()) -> None:
    """A table, and lines below it, which are never wrapped: they can be pasted. A closed terminal or pipe, or a full
    disk behind standard output, stops no run."""
    table = Table(show_header=False, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    try:
        Console(highlight=False, markup=False).print(table)
        for line in lines:
            print(line, flush=True)
    except (OSError, SystemExit) as error:  # rich raises SystemExit when a pipe is closed
        log.warning("standard output cannot be written: %r", error)
