"""Describe a checkpoint, or write its model in the released layout.

python -m megatron_tn.convert checkpoint=runs/demo/checkpoints/latest
python -m megatron_tn.convert checkpoint=runs/demo/checkpoints/latest output=runs/demo/export
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from megatron_tn.checkpoint.hf import save_pretrained
from megatron_tn.checkpoint.manifest import Manifest
from megatron_tn.cli import command
from megatron_tn.config import ConvertConfig
from megatron_tn.loading import load_any_model, resolve_checkpoint, tokenizer_path


@command(ConvertConfig, "convert")
def main(config: ConvertConfig) -> None:
    if not config.output:
        print(json.dumps(describe(resolve_checkpoint(config.checkpoint)), indent=1))
        return
    model = load_any_model(config.checkpoint, "cpu", config.precision)
    save_pretrained(model, config.output)
    if (tokenizer := tokenizer_path("", config.checkpoint)) is not None:
        shutil.copyfile(tokenizer, Path(config.output) / "tokenizer.json")
    print(f"wrote {config.output}")


def describe(directory: Path) -> dict:
    """What a checkpoint holds, from its manifest alone."""
    manifest = Manifest.read(directory)
    return {
        "checkpoint": str(directory),
        "step": manifest.step,
        "tokens": manifest.training["tokens"],
        "saved by": manifest.layout | {"engine": manifest.config["engine"]["name"]},
        "parameters": sum(math.prod(shape) for shape in manifest.shapes.values()),
        "model": manifest.config["model"],
        "padded_vocab": manifest.padded_vocab,
        "files": sorted({piece.file for pieces in manifest.pieces.values() for piece in pieces}),
    }


if __name__ == "__main__":
    main()
