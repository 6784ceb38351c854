"""README.md of an export: what the model is, what it was trained on, and how to run it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tn.checkpoint.manifest import CheckpointManifest
from megatron_tn.config import ModelConfig, storable
from megatron_tn.model.registry import architecture, parameter_count

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
{tags}
---
# {kind} {name}

{kind_linked} of {parameters:,} parameters: {layers} layers of
width {width}, {heads} heads, GLU width {glu}, vocabulary {vocabulary:,}; stored in {dtype}. {about}

## Training

{training}

## Use

Needs transformers 5 (tested with 5.23) and no other package. Every training document began with `{bos}`, which the
tokenizer does not add by itself.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({arguments})
model = AutoModelForCausalLM.from_pretrained({arguments})
ids = [tokenizer.bos_token_id, *tokenizer.encode("Once upon a time")]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=64)[0]))
```

{notes}
"""

# model_type -> what its card says beside the sizes.
FAMILIES = {
    "transnormer": {
        "tags": "- linear-attention\n- transnormer",
        "kind": "TransNormerLLM",
        "kind_linked": "A TransNormerLLM ([arXiv 2307.14995](https://arxiv.org/abs/2307.14995))",
        "about": "Linear attention: one token\nof decoding costs the same after any number of tokens.",
        "arguments": "folder, trust_remote_code=True",
        "notes": "Batches are padded on the left. Assisted decoding is refused: a recurrent state cannot go back some "
        "tokens.",
    },
    "llama": {
        "tags": "- llama",
        "kind": "Transformer",
        "kind_linked": "A Transformer with LLaMA's layers ([arXiv 2302.13971](https://arxiv.org/abs/2302.13971))",
        "about": "The head is the\nembedding.",
        "arguments": "folder",
        "notes": "Batches are padded on the left.",
    },
}


def card(config: ModelConfig, dtype: torch.dtype, facts: dict[str, Any], bos: str) -> str:
    """The text of README.md. facts: what is known of the training, name -> value; none for weights from elsewhere. bos:
    the entry that begins a document."""
    training = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return CARD.format(
        **FAMILIES[architecture(config).released.model_type],
        name=config.name,
        parameters=parameter_count(config),
        layers=config.layers,
        width=config.embed_dim,
        heads=config.heads,
        glu=config.glu_dim,
        vocabulary=config.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        training=training or "Not recorded: these weights came from a released folder.",
        bos=bos,
    )


def training_facts(manifest: CheckpointManifest, sources: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What a checkpoint's manifest says. sources: name of a source -> its documents and bytes of text, where known."""
    config, training = manifest.config, manifest.training
    data, optim = config["data"], config.get("optim", {})
    facts: dict[str, Any] = {
        "steps": f"{manifest.step:,}",
        "target tokens": f"{training.get('tokens', 0):,}",
        "sequence length": f"{data.get('sequence_length', 0):,}",
        "global batch": f"{data.get('global_batch', 0):,} sequences",
        "optimizer": f"{optim.get('name', 'adamw')}, peak learning rate {optim.get('lr', 0):g}",
        "precision": config["engine"].get("precision", "unknown"),
        "seed": config.get("seed", 0),
        "shards": f"`{_public(storable(data.get('manifest', '')))}`",
    }
    facts |= {
        f"source `{name}`": f"{documents:,} documents, {size:,} bytes of text"
        for name, (documents, size) in sources.items()
    }
    if held_out := training.get("held_out"):
        facts["held out"] = ", ".join(f"{name} {value:g}" for name, value in held_out.items())
    return facts


def _public(path: str) -> str:
    """The last three names of an absolute path, without the folders of this machine."""
    return str(Path(*Path(path).parts[-3:])) if Path(path).is_absolute() else path
