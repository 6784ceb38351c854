"""AdamW update (arXiv 1711.05101) of one parameter in one pass over memory, including its low-precision copy."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.adamw import reference

PIECE = 2**24  # elements per step of plain PyTorch, so that temporaries stay below 1 GiB


def adamw_(
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    divisor: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Update `master` and its moments `first` and `second` by the gradient `gradient` / `divisor`, in place.

    master, gradient, first, second: fp32, of one shape, contiguous. `gradient` itself is not changed.
    step: the number of this update, from 1.
    divisor: fp32, one element, on the same device; read without a host synchronisation. NaN or infinity: no update.
        None for 1.
    copy: of master's shape, any floating type, contiguous: set to the new master, rounded.

    Memory traffic: 30 bytes an element with a copy in bf16. Raises ValueError where types, shapes or strides do not
    fit.
    """
    tensors = {"master": master, "gradient": gradient, "first": first, "second": second}
    for name, tensor in (tensors | ({} if copy is None else {"copy": copy})).items():
        if tensor.shape != master.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name}.shape={tuple(tensor.shape)}, strides {tensor.stride()}: it must be contiguous, and of "
                f"master's shape {tuple(master.shape)}"
            )
        if tensor.dtype != torch.float32 and name in tensors:
            raise ValueError(f"{name}.dtype={tensor.dtype} must be float32")
    if divisor is not None and (divisor.numel(), divisor.dtype) != (1, torch.float32):
        raise ValueError(f"divisor.shape={tuple(divisor.shape)}, divisor.dtype={divisor.dtype} must be one float32")
    if not master.numel():  # a rank may hold no part of a parameter
        return
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step}
    if dispatch.choose("adamw_", master) == "triton":
        from kernels.adamw import triton_adamw

        triton_adamw.update_(**tensors, divisor=divisor, copy=copy, **settings)
        return
    flat = {name: tensor.view(-1).split(PIECE) for name, tensor in tensors.items()}
    copies = [None] * len(flat["master"]) if copy is None else copy.view(-1).split(PIECE)
    for index, part in enumerate(copies):
        pieces = {name: parts[index] for name, parts in flat.items()}
        _update_(**pieces, divisor=divisor, copy=part, **settings)


def _update_(
    *,
    master: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    copy: Tensor | None,
    divisor: Tensor | None,
    **settings,
) -> None:
    """The update in plain PyTorch. settings: those of `reference.adamw`."""
    if divisor is not None:
        gradient = gradient / divisor
    targets, found = [master, first, second], list(reference.adamw(master, gradient, first, second, **settings))
    if copy is not None:
        targets, found = [*targets, copy], [*found, found[0].to(copy.dtype)]
    for target, new in zip(targets, found, strict=True):
        target.copy_(new if divisor is None else torch.where(divisor.isfinite(), new, target))
