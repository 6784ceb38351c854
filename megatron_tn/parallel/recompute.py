"""Activation recomputation (arXiv 1604.06174): the backward pass computes a block's activations again.

none       the forward pass keeps all activations
selective  it keeps the outputs of matrix products and attention; norms, gates and activation functions run again
full       it keeps a block's input, and the whole block runs again: a third more operations
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels  # noqa: F401 (registers operators of COSTLY)
import megatron_tn.parallel.products  # noqa: F401 (registers operators of COSTLY)

# The operators with nearly all of a block's floating-point operations, whose outputs `selective` keeps.
COSTLY = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.megatron_tn.lightning_forward.default,
        torch.ops.megatron_tn.gla_forward.default,
        torch.ops.megatron_tn.gla_state.default,
        torch.ops.megatron_tn.column_forward.default,
        torch.ops.megatron_tn.row_forward.default,
    }
)


def recompute_blocks(blocks: Iterable[nn.Module], policy: str, every: int = 1) -> None:
    """Replace the forward of blocks 0, every, 2 every, ... by one that recomputes by `policy`.

    In place: no module is added and none gets another name.

    To be called before blocks are compiled and before an engine hooks into them: the weights that it gathers for a
    block's backward pass then serve its second forward pass too.

    Raises:
        ValueError: an unknown policy.
    """
    if policy == "none":
        return
    if policy not in ("selective", "full"):
        raise ValueError(f"policy={policy!r} is not one of none, selective, full")
    settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block draws random numbers
    if policy == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_costly)
    for index, block in enumerate(blocks):
        if index % every == 0:
            block.forward = functools.partial(_recomputed, block.forward, settings)


def _recomputed(forward, settings, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **settings, **kwargs)


def _keep_costly(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
