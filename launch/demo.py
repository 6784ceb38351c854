"""`make demo`: from raw text to a trained, resumed and sampled model, in one command and a few minutes.

1. gather the running Python's standard library, clean it, train a tokenizer, write shards   (data_pipeline.run)
2. train model=demo as tensor parallel 2 x ZeRO 1 on two CPU processes                       (megatron_tn.train)
3. resume from the half-way checkpoint, and check that the losses agree bitwise              (megatron_tn.train)
4. held-out bits per byte, compared with a unigram model, gzip -9 and xz -9                  (megatron_tn.evaluate)
5. plot the loss curve, generate a continuation of "def "                                    (megatron_tn.generate)

All output goes to runs/demo; summary.json has all figures and the paths of the files behind them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_tn.training.curve import draw
from megatron_tn.training.run_folder import RunFolder

OUTPUT = Path("runs/demo")
RUN = RunFolder(OUTPUT)
RESUMED = RunFolder(OUTPUT / "resumed")
RESUME_STEPS = 8
PROMPT = "def "
console = Console(highlight=False)


def main() -> None:
    began = time.time()
    timings = {}

    def stage(name: str, title: str, function, *arguments) -> Any:
        console.rule(f"[bold]{title}")
        since = time.time()
        result = function(*arguments)
        timings[name] = round(time.time() - since, 1)
        return result

    stage("data", "1/5  raw text, cleaned and tokenised", gather_and_clean)
    stage("train", "2/5  training: tensor parallel 2 x ZeRO 1", train)
    resumed = stage("resume", "3/5  resuming from half way", resume)
    figures = stage("evaluate", "4/5  held-out bits per byte", evaluate)
    sample = stage("sample", "5/5  loss curve and a sample", draw_and_sample)
    summary = summarise(resumed, figures, sample, timings, time.time() - began)
    show(summary)
    if not resumed["bitwise_equal"]:
        sys.exit("the resumed run's losses differ from the uninterrupted run's")


def run(*command: str) -> None:
    """Run a command line of this project with output to this terminal; on failure, exit with its code."""
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def gather_and_clean() -> None:
    run("-m", "data_pipeline.run", "pipeline=demo", f"output={OUTPUT / 'data'}")


def train() -> None:
    # A fresh run each time, so that the curve begins at step 0.
    shutil.rmtree(RUN.checkpoints, ignore_errors=True)
    shutil.rmtree(RESUMED.path, ignore_errors=True)
    for file in (RUN.journal.path, RUN.config_file, RUN.ledger_file):
        file.unlink(missing_ok=True)
    launch_training("experiment=demo")


def launch_training(*overrides: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 2) // 2, 1)))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    run(*torchrun, "-m", "megatron_tn.train", *overrides)


def resume() -> dict[str, Any]:
    """Train again from the half-way checkpoint, in another run folder; compare losses bitwise."""
    step, half = min(RUN.saved().items())
    launch_training(
        "experiment=demo",
        f"run_dir={RESUMED}",
        f"checkpoint.resume={half}",
        f"stop_after={step + RESUME_STEPS}",
        "logging=quiet",
    )
    before = {r["step"]: r["loss"] for r in RUN.records("loss") if step < r["step"] <= step + RESUME_STEPS}
    after = {r["step"]: r["loss"] for r in RESUMED.records("loss")}
    equal = before == after and len(after) == RESUME_STEPS
    console.print(f"steps {step + 1} to {step + RESUME_STEPS}: losses {'agree bitwise' if equal else 'DIFFER'}")
    return {"from": str(half), "losses_before": before, "losses_after": after, "bitwise_equal": equal}


def checkpoint() -> Path:
    return max(RUN.saved().items())[1]


def evaluate() -> dict[str, Any]:
    output = OUTPUT / "evaluation.json"
    run(
        "-m",
        "megatron_tn.evaluate",
        f"checkpoint={checkpoint()}",
        f"manifest={OUTPUT / 'data/heldout/manifest.json'}",
        f"train_manifest={OUTPUT / 'data/train/manifest.json'}",
        f"output={output}",
        "device=cpu",
    )
    return json.loads(output.read_text())


def draw_and_sample() -> str:
    draw({"training": RUN, "resumed from the half-way checkpoint": RESUMED}, OUTPUT / "loss.png")
    command = ("-m", "megatron_tn.generate", f"checkpoint={checkpoint()}", f"prompt={PROMPT}", "device=cpu", "seed=1")
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    console.print(done.stdout, markup=False)
    return done.stdout


def summarise(
    resumed: dict[str, Any], figures: dict[str, Any], sample: str, timings: dict[str, float], seconds: float
) -> dict[str, Any]:
    """All figures of the demo and the paths of the files behind them; also written to summary.json."""
    config, records = RUN.frozen_config(), RUN.records("loss")
    summary = {
        "steps": records[-1]["step"],
        "tokens": records[-1]["tokens"],
        "bits_per_byte": figures["bits_per_byte"],
        "heldout": {key: figures[key] for key in ("manifest", "documents", "tokens", "text_bytes", "nats_per_token")},
        "resume": resumed,
        "layout": {"processes": records[-1]["world_size"], "tp": config.parallel.tp, "zero": config.engine.zero_stage},
        "tokens_per_second": sorted(record["tokens_per_second"] for record in records)[len(records) // 2],
        "checkpoint": str(checkpoint()),
        "tokenizer": str(RUN.tokenizer),
        "loss_curve": str(OUTPUT / "loss.png"),
        "sample": sample,
        "seconds": {**timings, "all": round(seconds, 1)},
    }
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def show(summary: dict[str, Any]) -> None:
    table = Table(title=f"held-out bits per byte after {summary['tokens']:,} tokens, {summary['seconds']['all']:.0f} s")
    table.add_column("model")
    table.add_column("bits per byte", justify="right")
    for name, bits in sorted(summary["bits_per_byte"].items(), key=lambda item: item[1]):
        label = "TransNormerLLM (this run)" if name == "model" else name
        table.add_row(label, f"{bits:.3f}", style="bold green" if name == "model" else "")
    console.print(table)
    console.print(f"everything is in {OUTPUT / 'summary.json'}; the curve is {summary['loss_curve']}")


if __name__ == "__main__":
    main()
