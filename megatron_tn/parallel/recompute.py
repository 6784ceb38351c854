"""Activation recomputation (arXiv 1604.06174): a block's activations are made again in the backward pass, not kept.

none       everything that backward needs is kept
selective  matrix products and attention keep their outputs; what is cheap (norms, gates, activations) is redone
full       a block keeps its input alone, and runs twice (a third more operations)
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
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


def recompute_blocks(blocks: Iterable[nn.Module], policy: str, every: int = 1, *, one_graph: bool = False) -> None:
    """Have every `every`-th block, the first included, recompute by `policy`. In place; no module or name is added.

    Blocks are changed before they are compiled, and before an engine hooks into them: the weights that it gathers for a
    block's backward pass serve its second forward pass too. one_graph: each block will be compiled as one.

    Raises:
        ValueError: an unknown policy.
    """
    if policy == "none":
        return
    if policy not in ("selective", "full"):
        raise ValueError(f"policy={policy!r} is not one of none, selective, full")
    settings = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block draws random numbers
    if policy == "selective" and one_graph:
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_costly)
    elif policy == "selective":
        settings["context_fn"] = _keep_and_replay
    for index, block in enumerate(blocks):
        if index % every == 0:
            block.forward = functools.partial(_recomputed, block.forward, settings)


def _recomputed(forward, settings, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, **settings, **kwargs)


def _keep_costly(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_and_replay() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    # torch's own selective contexts, which compilers understand, want every operator of the forward pass again in the
    # same order. These ask it of the costly ones alone.
    kept: dict[object, deque] = defaultdict(deque)
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):
    """The first pass: outputs of costly operators are put aside, in order."""

    def __init__(self, kept: dict[object, deque]):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator in COSTLY:
            self.kept[operator].append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _Replay(_Keep):
    """The second pass: costly operators give back what they gave before."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in COSTLY:
            return self.kept[operator].popleft()
        return operator(*args, **(kwargs or {}))
