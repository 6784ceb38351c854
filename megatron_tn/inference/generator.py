"""Decoding: one forward pass over the prompt, then one token at a time from the recurrent state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron_tn.inference.sampler import Sampler
from megatron_tn.model.base import Model


@torch.inference_mode()
def generate(
    model: Model, prompt: Sequence[int], *, max_new_tokens: int, sampler: Sampler, seed: int = 0
) -> Iterator[int]:
    """Sample up to `max_new_tokens` ids that follow `prompt`, ending before the model's eos_id.

    seed: of the CPU random generator. Collective over tensor parallelism: every rank calls `generate` with the same
    arguments and yields the same ids.

    Raises:
        ValueError: the prompt is empty, holds an id outside the vocabulary, or leaves too little of
            model.max_length.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; begin a document with its bos id")
    if max(prompt) >= model.config.vocab_size or min(prompt) < 0:
        raise ValueError(f"the prompt holds id {max(prompt)}, but the vocabulary has {model.config.vocab_size} entries")
    most = model.config.max_length
    if most and len(prompt) + max_new_tokens - 1 > most:  # the last token is not fed back
        asked = f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens}"
        raise ValueError(f"{asked} are longer than model.max_length={most}")
    device = next(model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)
    state = None
    for _ in range(max_new_tokens):
        out = model(tokens, state=state, return_state=True)
        state = out.state
        chosen = sampler(out.logits[:, -1], draw)
        if chosen.item() == model.config.eos_id:
            return
        yield chosen.item()
        tokens = chosen.view(1, 1).to(device)
