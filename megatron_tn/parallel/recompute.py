"""Activation recomputation (arXiv 1604.06174): the backward pass computes a block's activations again.

none       all activations are kept
selective  outputs of matrix products and attention are kept; norms, gates and activation functions are recomputed
full       only a block's input is kept; the whole block is recomputed: a third more operations
"""

import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels  # noqa: F401 (registers operators of COSTLY)
import megatron_tn.parallel.float8_operators  # noqa: F401 (registers operators of COSTLY, with those of products.py)

# Operators with nearly all of a block's FLOPs. `selective` keeps their outputs.
COSTLY = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._flash_attention_forward.default,
        torch.ops.megatron_tn.lightning_forward.default,
        torch.ops.megatron_tn.gla_forward.default,
        torch.ops.megatron_tn.gla_state.default,
        torch.ops.megatron_tn.column_forward.default,
        torch.ops.megatron_tn.row_forward.default,
        torch.ops.megatron_tn.column_forward_fp8.default,
        torch.ops.megatron_tn.row_forward_fp8.default,
    }
)


def recompute_blocks(blocks: Iterable[nn.Module], policy: str, every: int = 1) -> None:
    """Replace the forward of blocks 0, every, 2 every, ... by one that recomputes by `policy`.

    In place: modules and their names stay.

    Call this before blocks are compiled and before an engine adds hooks to them: then the weights gathered for a
    block's backward pass also serve its recomputation.

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
