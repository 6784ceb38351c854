"""Describe a checkpoint, verify it, or write its model in the released layout.

python -m megatron_tn.convert describe checkpoint=runs/demo                         (the newest; or one's folder)
python -m megatron_tn.convert verify   checkpoint=runs/demo/checkpoints/step_00000110     exit code 1: it is damaged
python -m megatron_tn.convert export   checkpoint=runs/demo output=runs/demo/export
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rich.console import Console
from rich.table import Table

from megatron_tn.checkpoint.hf import save_pretrained
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest
from megatron_tn.checkpoint.verify import verify
from megatron_tn.cli import command
from megatron_tn.config import ConfigError, ConvertConfig, read_mapping
from megatron_tn.loading import load_any_model, resolve_checkpoint, tokenizer_path
from megatron_tn.training.run_folder import RunFolder

DAMAGED = 1  # exit code


def convert(config: ConvertConfig) -> None:
    if config.action == "export":
        export(config)
        return
    directory = resolve_checkpoint(config.checkpoint)
    if not (directory / MANIFEST).is_file():
        raise ConfigError(f"checkpoint={config.checkpoint} is a released model, not a checkpoint: it has no {MANIFEST}")
    if config.action == "verify":
        problems = verify(directory)
        if config.json:
            print(json.dumps({"checkpoint": str(directory), "whole": not problems, "problems": problems}, indent=1))
        else:
            print(*problems or [f"{directory} is whole"], sep="\n")
        sys.exit(DAMAGED if problems else 0)
    if config.json:
        print(json.dumps(describe(directory), indent=1))
    else:
        show(describe(directory))


def export(config: ConvertConfig) -> None:
    if not config.output:
        raise ConfigError("output is not set: name a folder to write the model to")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file: name a folder to write the model to")
    # Of a run or a checkpoint, an export would overwrite config.json; a model exported to itself gains nothing.
    if (output / MANIFEST).exists() or RunFolder(output).is_there:
        raise ConfigError(f"output={output} is the folder of a run or a checkpoint: name another to write the model to")
    if output.exists() and output.samefile(resolve_checkpoint(config.checkpoint)):
        raise ConfigError(f"output={output} is checkpoint={config.checkpoint} itself")
    model = load_any_model(config.checkpoint, "cpu", config.precision)
    save_pretrained(model, config.output)
    if (tokenizer := tokenizer_path("", config.checkpoint)) is not None:
        # Readers of the export must not cut or pad texts as the tokenizer's earlier user did.
        values = read_mapping(tokenizer) | {"truncation": None, "padding": None}
        (output / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {config.output}")


# What people are told of a checkpoint's config.
SHOWN = {
    "engine": ("name", "zero_stage", "precision"),
    "model": ("name", "layers", "embed_dim", "heads", "vocab_size"),
    "data": ("manifest",),
}


def describe(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds, from its manifest alone.

    Raises:
        ConfigError: there is no manifest, it is damaged, or what is shown of its config is not there.
    """
    manifest = CheckpointManifest.read(directory)
    missing = [f"{part}.{key}" for part, keys in SHOWN.items() for key in keys if key not in manifest.config[part]]
    if missing:
        raise ConfigError(f"{directory / MANIFEST}: config has no {', '.join(missing)}")
    training, config, engine = manifest.training, manifest.config, manifest.config["engine"]
    return {
        "checkpoint": str(directory),
        "step": manifest.step,
        "optimizer_step": manifest.optimizer_step,
        "tokens": training.get("tokens"),
        "samples": training.get("samples"),
        "skipped_batches": training.get("skip", []),
        "rewinds": training.get("rewinds", []),
        "held_out": training.get("held_out", {}),
        "saved_by": manifest.layout | {"engine": engine["name"], "zero_stage": engine["zero_stage"]},
        "precision": engine["precision"],
        "parameters": sum(math.prod(shape) for shape in manifest.shapes.values()),
        "bytes": sum(record.size for record in manifest.files.values()),
        "files": {name: record.size for name, record in sorted(manifest.files.items())},
        "model": config["model"],
        "data": config["data"]["manifest"],
        "padded_vocab": manifest.padded_vocab,
        "tensors": {
            name: {
                "shape": shape,
                "pieces": {kind: len(manifest.pieces.get(f"{kind}/{name}", [])) for kind in manifest.kinds},
            }
            for name, shape in manifest.shapes.items()
        },
    }


def show(facts: dict[str, Any]) -> None:
    """The same for people: a table of facts and one of tensors."""
    console = Console(markup=False)  # paths may have brackets
    saved_by = " x ".join(f"{name} {value}" for name, value in facts["saved_by"].items())
    model = facts["model"]
    rewinds = [f"from {one['from']} to {one['to']}, by {one['by']}" for one in facts["rewinds"]]
    summary = Table(show_header=False, title=facts["checkpoint"])
    for name, value in {
        "step": f"{facts['step']:,}, of which {facts['optimizer_step']:,} were applied",
        "tokens": f"{facts['tokens'] or 0:,} in {facts['samples'] or 0:,} sequences",
        "skipped batches": ", ".join(map(str, facts["skipped_batches"])) or "none",
        "rewinds": "; ".join(rewinds) or "none",
        "held out": ", ".join(f"{name} {value:g}" for name, value in facts["held_out"].items()) or "not evaluated",
        "saved by": f"{saved_by}, trained in {facts['precision']}",
        "size": f"{facts['bytes'] / 2**30:.3f} GiB in {len(facts['files'])} files",
        "model": f"{model['name']}: {facts['parameters']:,} parameters, {model['layers']} layers of width "
        f"{model['embed_dim']}, {model['heads']} heads, vocabulary {model['vocab_size']:,}",
        "data": facts["data"],
    }.items():
        summary.add_row(name, str(value))
    console.print(summary)
    tensors = Table("tensor", "shape", "elements", "pieces")
    for name, tensor in facts["tensors"].items():
        counts = sorted(set(tensor["pieces"].values()))
        tensors.add_row(
            name, " x ".join(map(str, tensor["shape"])), f"{math.prod(tensor['shape']):,}", "-".join(map(str, counts))
        )
    console.print(tensors)


_run = command(ConvertConfig, "convert")(convert)


def main() -> None:
    """The command line, whose first word may name the action."""
    if len(sys.argv) > 1 and sys.argv[1] in get_args(get_type_hints(ConvertConfig)["action"]):
        sys.argv[1] = f"action={sys.argv[1]}"
    _run()


if __name__ == "__main__":
    main()
