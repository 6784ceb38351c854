"""The state after a prompt: the training-style forward pass, chunk by chunk."""

from collections.abc import Sequence

import torch

from megatron_tn.model.base import DecodingState, Model

CHUNK = 4096  # tokens


@torch.no_grad()
def prefill(model: Model, ids: Sequence[int], state: DecodingState | None, chunk: int) -> DecodingState | None:
    """The state (B = 1) after `ids`, which follow the tokens of `state`. Without ids, `state` itself.

    chunk: tokens of one forward pass; device memory depends on it and not on the number of ids. Collective over tensor
    parallelism.
    """
    device = next(model.parameters()).device
    for start in range(0, len(ids), chunk):
        tokens = torch.tensor(ids[start : start + chunk], dtype=torch.int64).to(device)
        state = model.advance(tokens[None], state)
    return state
