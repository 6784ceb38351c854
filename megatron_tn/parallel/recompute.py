"""Activation recomputation (arXiv 1604.06174): a block's activations are made again in the backward pass, not kept.

none       everything that backward needs is kept
selective  matrix products and attention keep their outputs; what is cheap (norms, gates, activations) is redone
full       a block keeps its input alone, and runs twice (a third more operations)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels  # noqa: F401 (registers operators named below)
import megatron_tn.parallel.products  # noqa: F401 (likewise)

# The operators that do the block's floating-point work. Their outputs are what the next operators need anyway.
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
    """Have every `every`-th block, the first included, recompute by `policy`. In place; no module or name is added.

    Blocks are changed before they are compiled, and before an engine hooks into them: the weights that it gathers for a
    block's backward pass serve its second forward pass too.

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
