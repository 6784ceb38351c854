"""Find the first tensor, and its rank, that holds NaN or infinity, by running the step's batch again."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_tn.engine.base import Engine
from megatron_tn.parallel.world import of_all
from megatron_tn.training.step import Microbatch, run_microbatch


class Culprit(NamedTuple):
    """A non-finite tensor. rank: global. tensor: description. when: index in the order in which the pass computed its
    tensors."""

    rank: int
    tensor: str
    when: int


class _Watch:
    """Checks tensors in the order of computation. seen: tensors checked so far. found: description and index of the
    first non-finite tensor."""

    def __init__(self) -> None:
        self.seen = 0
        self.found: tuple[str, int] | None = None

    def look(self, what: str, tensor: Tensor) -> None:
        self.seen += 1
        if hasattr(tensor, "to_local"):  # a DTensor, whose isfinite is collective, but only some ranks run it
            tensor = tensor.to_local()
        if self.found is None and tensor.is_floating_point() and not tensor.isfinite().all():
            self.found = (what, self.seen)


@contextlib.contextmanager
def watching(model: nn.Module, whole: AbstractContextManager | None = None) -> Iterator[_Watch]:
    """Checks all parameters on entering and, within the block, every module's output and every gradient.

    whole: `Engine.whole_weights()`, without which parameters may have no memory.
    """
    watch = _Watch()
    with whole or contextlib.nullcontext():
        for name, parameter in model.named_parameters():
            watch.look(f"parameter {name}", parameter.detach())

    def gradient_of(what: str):
        # The gradient is None where the loss does not depend on the output.
        return lambda gradient: None if gradient is None else watch.look(f"the gradient of {what}", gradient)

    def after(name: str):
        def hook(module: nn.Module, inputs, output) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor):
                    watch.look(f"the output of {name}", tensor.detach())
                    if tensor.requires_grad:
                        handles.append(tensor.register_hook(gradient_of(f"the output of {name}")))

        return hook

    def before(prefix: str):
        def hook(module: nn.Module, inputs) -> None:
            # FSDP2 swaps in unsharded parameters just before a block runs; their gradients are checked.
            for name, parameter in module.named_parameters(prefix=prefix):
                if parameter.requires_grad and id(parameter) not in hooked:
                    hooked[id(parameter)] = parameter.register_hook(gradient_of(name))

        return hook

    hooked: dict[int, RemovableHandle] = {}
    handles: list[RemovableHandle] = []
    before("")(model, ())
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name)))
        if name:
            handles.append(module.register_forward_hook(after(name)))
    try:
        # Compiled code ignores hooks registered after compilation.
        with torch.compiler.set_stance("force_eager"):
            yield watch
    finally:
        for handle in (*handles, *hooked.values()):
            handle.remove()


def find_nonfinite(engine: Engine, microbatches: Sequence[Microbatch], device: torch.device) -> list[Culprit]:
    """Run `microbatches` again on unchanged weights. Returns, for each rank with the earliest non-finite value, that
    tensor; an empty list when all values are finite this time. Weights, moments and gradients are unchanged.

    Collective over all ranks. For a step whose update was refused. Costs a step and a host synchronisation per tensor.
    """
    tokens = sum(batch.targets.numel() for batch in microbatches)
    with watching(engine.model, engine.whole_weights()) as watch:
        for batch in microbatches:
            run_microbatch(engine, batch, torch.tensor(1 / tokens, device=device), device, last=False)
    # The engine must not apply these gradients. One more pass makes all of them NaN, so the engine refuses the update
    # on every rank and clears its gradient sums.
    run_microbatch(engine, microbatches[0], torch.tensor(float("nan"), device=device), device, last=True)
    if engine.step(0.0).applied:
        raise RuntimeError("an engine applied a gradient that is not finite")
    mine = watch.found and Culprit(dist.get_rank() if dist.is_initialized() else 0, *watch.found)
    found = [culprit for culprit in of_all(mine) if culprit]
    return [culprit for culprit in found if culprit.when == min(one.when for one in found)]
