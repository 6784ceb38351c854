"""An export as users of transformers load it."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

CHUNKS = (70, 1, 20)  # tokens of a prefill in parts; the plain PyTorch attention takes 64 at a time


def transformers() -> ModuleType:
    """The package, told to look nothing up on a network. Skips the test where it is not installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "HF_MODULES_CACHE" not in os.environ:  # where it copies the modelling files of exports to
        os.environ["HF_MODULES_CACHE"] = cache = tempfile.mkdtemp(prefix="hub-modules-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install -e '.[hub]')")


def load(folder: Path, **options) -> torch.nn.Module:
    return transformers().AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def module_of(model: torch.nn.Module) -> ModuleType:
    """The modelling file, as transformers imported it."""
    return sys.modules[type(model).__module__]


@torch.no_grad()
def logits_by_path(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """How it was computed -> logits [B, T, V] of tokens [B, T], T > 93: in our kernels' operators and in plain PyTorch,
    each of all tokens at once, by prefill in chunks, and by one-token decoding after a prefill."""
    model = load(folder, dtype=dtype).to(tokens.device)
    module = module_of(model)
    kernels, found = module.kernel_gla, {}
    chunks = tokens.split([*CHUNKS, tokens.shape[1] - sum(CHUNKS)], dim=1)
    steps = [tokens[:, :-12], *tokens[:, -12:].split(1, dim=1)]
    assert kernels is not None
    try:
        for name, module.kernel_gla in (("kernels", kernels), ("plain", None)):
            found[f"transformers, {name}"] = model(tokens).logits
            for way, parts in (("chunked prefill", chunks), ("one-token decoding", steps)):
                cache, logits = None, []
                for part in parts:
                    out = model(part, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    logits.append(out.logits)
                found[f"{way}, {name}"] = torch.cat(logits, dim=1)
    finally:
        module.kernel_gla = kernels
    return found
