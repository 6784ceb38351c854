"""Describe a checkpoint, verify it, write its model in the released layout, or make a checkpoint of a released model.

python -m megatron_tn.convert describe checkpoint=runs/demo                         (the newest checkpoint of a run)
python -m megatron_tn.convert verify   checkpoint=runs/demo/checkpoints/step_00000110     exit code 1: damaged
python -m megatron_tn.convert export   checkpoint=runs/demo output=runs/demo/export    a folder for transformers
python -m megatron_tn.convert import   checkpoint=released/ output=runs/more           begin a run with these weights
"""

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data_pipeline.shards.manifest import Manifest as Shards
from data_pipeline.shards.manifest import TokenizerInfo
from megatron_tn.checkpoint.load import CheckpointWeights
from megatron_tn.checkpoint.manifest import MANIFEST, CheckpointManifest, checkpoint_name
from megatron_tn.checkpoint.verify import verify
from megatron_tn.cli import command
from megatron_tn.cli.tables import table_console
from megatron_tn.config import ConfigError, ConvertConfig, ModelConfig, changed, out_of_bounds, resolved
from megatron_tn.engine.base import DTYPES
from megatron_tn.loading import (
    open_weights,
    problems_of_vocabulary,
    read_tokenizer,
    resolve_checkpoint,
    tokenizer_path,
    unreadable,
)
from megatron_tn.model.registry import problems_of_export
from megatron_tn.released.card import card, training_facts
from megatron_tn.released.to_checkpoint import write_checkpoint
from megatron_tn.released.tokenizer import TOKENIZER_CONFIG_FILE, tokenizer_files
from megatron_tn.released.weights import ReleasedWeights
from megatron_tn.released.write import alone_in, problems_of_output, whole_tensor, write_released
from megatron_tn.training.run_folder import RunFolder

DAMAGED = 1  # exit code


# Actions -> the settings that they alone read.
OF_ACTIONS = {
    ("export",): ("shard_mib",),
    ("export", "import"): ("output", "precision"),
    ("describe", "verify"): ("json",),
}


def convert(config: ConvertConfig) -> None:
    problems = list(out_of_bounds(config).values())
    for actions, names in OF_ACTIONS.items():
        if config.action not in actions:
            of = " and ".join(actions)
            problems += [f"{said} is of {of}, not of action={config.action}" for said in changed(config, names)]
    if problems:
        raise ConfigError(problems)
    if config.action in ("export", "import"):
        try:
            (export if config.action == "export" else import_weights)(config)
        except OSError as error:
            raise ConfigError(f"output={config.output} cannot be written: {error.strerror or error}") from None
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
    """Write the model of a checkpoint or of a released folder as a folder that transformers can load."""
    directory, output = check_output(config), Path(config.output)
    if problems := problems_of_output(output):
        raise ConfigError(problems)
    with unreadable(config.checkpoint, directory), open_weights(directory) as weights:
        if problems := problems_of_export(weights.config):
            raise ConfigError(problems)
        data = shards_of(weights)
        model = weights.config if data is None else with_ids_of(data.tokenizer, weights.config)
        dtypes = {name: DTYPES.get(config.precision, stored) for name, stored in weights.dtypes.items()}
        texts, bos = {}, str(model.bos_id)
        if (tokenizer := tokenizer_path("", config.checkpoint)) is not None:
            if (
                data is not None
                and (found := hashlib.sha256(tokenizer.read_bytes()).hexdigest()) != data.tokenizer.sha256
            ):
                raise ConfigError(
                    f"tokenizer {tokenizer} has sha256 {found[:12]}..., but the tokenizer of the training shards has "
                    f"{data.tokenizer.sha256[:12]}...: put that tokenizer.json beside the checkpoint"
                )
            texts = tokenizer_files(tokenizer, model)
            bos = json.loads(texts[TOKENIZER_CONFIG_FILE])["bos_token"]
        known = not isinstance(weights, ReleasedWeights)
        facts = training_facts(weights.manifest, text_of_sources(data)) if known else {}
        texts["README.md"] = card(model, next(iter(dtypes.values())), facts, bos)
        write_released(
            output,
            model,
            weights.shapes,
            dtypes,
            lambda name: whole_tensor(weights, name, dtypes[name]),
            shard_bytes=config.shard_mib << 20,
            texts=texts,
            sequence_length=length_of(weights),
        )
    print(f"wrote {output}")


def import_weights(config: ConvertConfig) -> None:
    """Write a released folder's or checkpoint's weights as the first checkpoint of a run, without optimizer state."""
    directory, run = check_output(config), RunFolder(config.output)
    inside = [path.name for path in run.path.iterdir()] if run.path.is_dir() else []
    if any(not name.startswith(".") for name in inside) and not left_by_a_kill(run):
        raise ConfigError(f"output={run.path} holds files: name a new folder for the run")
    tokenizer = tokenizer_path("", config.checkpoint)
    with unreadable(config.checkpoint, directory), open_weights(directory) as weights:
        if tokenizer is not None:
            problems = problems_of_vocabulary(read_tokenizer(tokenizer), weights.config, config.checkpoint)
            if problems:
                raise ConfigError(problems)
        stored = "bf16" if set(weights.dtypes.values()) <= {torch.bfloat16, torch.float16} else "fp32"
        precision = stored if config.precision == "trained" else config.precision
        run.path.mkdir(parents=True, exist_ok=True)
        with alone_in(run.path):
            try:
                if tokenizer is not None:
                    run.keep_tokenizer(tokenizer)
                written = write_checkpoint(weights, run.checkpoints, precision, length_of(weights))
            except BaseException:
                run.tokenizer.unlink(missing_ok=True)
                raise
    print(f"wrote {written}")


def check_output(config: ConvertConfig) -> Path:
    """The folder of the weights that config.checkpoint names. Raises ConfigError if config.output is not allowed."""
    if not config.output:
        raise ConfigError("output is not set: name a folder to write the model to")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file: name a folder to write the model to")
    # An export into the folder of a run or a checkpoint would overwrite its config.json.
    run = RunFolder(output)
    if (output / MANIFEST).exists() or (run.is_there and not left_by_a_kill(run)):
        raise ConfigError(f"output={output} is the folder of a run or a checkpoint: name another to write the model to")
    directory = resolve_checkpoint(config.checkpoint)
    if output.exists() and output.samefile(directory):
        raise ConfigError(f"output={output} is checkpoint={config.checkpoint} itself: name another folder")
    return directory


def left_by_a_kill(run: RunFolder) -> bool:
    """Whether the folder holds what an import had written when it was killed, and nothing else."""
    partial = run.checkpoints / f"{checkpoint_name(0)}.tmp"
    written = {run.checkpoints, run.tokenizer}
    return partial.is_dir() and [*run.checkpoints.iterdir()] == [partial] and {*run.path.iterdir()} <= written


def shards_of(weights: CheckpointWeights | ReleasedWeights) -> Shards | None:
    """The manifest of a checkpoint's training shards; None if it cannot be read on this machine."""
    try:
        path = "" if isinstance(weights, ReleasedWeights) else resolved(weights.manifest.config["data"]["manifest"])
        return Shards.load(path, check_files=False) if path and Path(path).is_file() else None
    except (KeyError, TypeError, ValueError, OSError):  # none in an old checkpoint, an unset variable, damage
        return None


def length_of(weights: CheckpointWeights | ReleasedWeights) -> int | None:
    """data.sequence_length of training; None where it is not known."""
    if isinstance(weights, ReleasedWeights):
        return weights.sequence_length
    return weights.manifest.config["data"].get("sequence_length")


def text_of_sources(data: Shards | None) -> dict[str, tuple[int, int]]:
    """Source -> (number of documents, bytes of text)."""
    found: dict[str, tuple[int, int]] = {}
    for shard in () if data is None else data.shards:
        documents, size = found.get(shard.source, (0, 0))
        found[shard.source] = (documents + shard.documents, size + shard.text_bytes)
    return found


def with_ids_of(tokenizer: TokenizerInfo, model: ModelConfig) -> ModelConfig:
    """`model` with the tokenizer's special ids, which training uses instead of model.bos_id, eos_id and pad_id."""
    return dataclasses.replace(model, bos_id=tokenizer.bos, eos_id=tokenizer.eos, pad_id=tokenizer.pad)


# Settings of a checkpoint's config that `describe` needs.
SHOWN = {
    "engine": ("name", "zero_stage", "precision"),
    "model": ("name", "layers", "embed_dim", "heads", "vocab_size"),
    "data": ("manifest",),
}


def describe(directory: Path) -> dict[str, Any]:
    """The contents of a checkpoint, read from its manifest only.

    Raises:
        ConfigError: the manifest is missing or damaged, or its config lacks a setting of SHOWN.
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
                "pieces": {kind: len(manifest.pieces.get(f"{kind}/{name}", [])) for kind in manifest.kinds(name)},
            }
            for name, shape in manifest.shapes.items()
        },
    }


def show(facts: dict[str, Any]) -> None:
    """Print `describe`'s result as a table of facts and a table of tensors."""
    console = table_console()
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
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"action={sys.argv[1]}"
    _run()


if __name__ == "__main__":
    main()
