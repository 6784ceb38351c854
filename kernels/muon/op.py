"""The elementwise parts of Muon's update, before and after the Newton-Schulz iteration (kernels/newton_schulz)."""

import torch
from torch import Tensor

from kernels import dispatch


def muon_direction_(out: Tensor, momentum: Tensor, gradient: Tensor, *, beta: float, divisor: Tensor) -> None:
    """Update `momentum` M by the gradient G = `gradient` / `divisor`, and set `out` to the direction of the step:

        M = beta M + (1 - beta) G;   out = (1 - beta) G + beta M

    All [n], contiguous; momentum and gradient in fp32 (fp64 in plain PyTorch), out of any floating type. `gradient`
    itself is not changed. divisor: fp32, one element, on the same device; read without a host synchronisation. NaN or
    infinity: momentum is unchanged, and out is momentum, which is finite.

    Memory traffic: 14 bytes an element with out in bf16.
    """
    _check({"out": out, "momentum": momentum, "gradient": gradient}, divisor)
    if not momentum.numel():
        return
    if dispatch.choose("muon_direction_", momentum, _unsupported(momentum, gradient)) == "triton":
        from kernels.muon import triton_muon

        triton_muon.direction_(out, momentum, gradient, beta, divisor)
        return
    given = torch.where(divisor.isfinite(), gradient / divisor, momentum)
    momentum.lerp_(given, 1 - beta)  # M + (1 - beta) (M - M) = M where the divisor is not finite
    out.copy_(given.lerp_(momentum, beta))


def muon_apply_(
    master: Tensor,
    update: Tensor,
    *,
    lr: float,
    scale: float,
    weight_decay: float,
    divisor: Tensor,
    copy: Tensor | None = None,
) -> None:
    """master -= lr (scale update + weight_decay master), unless `divisor` is not finite, and copy = master, rounded.

    All [n], contiguous; master in fp32 (fp64 in plain PyTorch), update and copy of any floating type. divisor: as in
    `muon_direction_`.

    Memory traffic: 12 bytes an element with update and copy in bf16.
    """
    _check({"master": master, "update": update} | ({} if copy is None else {"copy": copy}), divisor)
    if not master.numel():
        return
    if dispatch.choose("muon_apply_", master, _unsupported(master)) == "triton":
        from kernels.muon import triton_muon

        triton_muon.apply_(master, update, copy, 1 - lr * weight_decay, lr * scale, divisor)
        return
    applied = divisor.isfinite().to(master.dtype)
    master.mul_(1 - applied * (lr * weight_decay))
    master.addcmul_(update.to(master.dtype), applied * (lr * scale), value=-1)
    if copy is not None:
        copy.copy_(master)


def _unsupported(*tensors: Tensor) -> str | None:
    wide = next((x.dtype for x in tensors if x.dtype != torch.float32), None)
    return None if wide is None else f"dtype {wide} is not float32"


def _check(tensors: dict[str, Tensor], divisor: Tensor) -> None:
    """Raises ValueError where shapes or strides do not fit."""
    length = next(iter(tensors.values())).shape
    for name, tensor in tensors.items():
        if tensor.shape != length or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{name}.shape={tuple(tensor.shape)}, strides {tensor.stride()}: it must be contiguous, and of the "
                f"shape {tuple(length)} = [n]"
            )
    if (divisor.numel(), divisor.dtype) != (1, torch.float32):
        raise ValueError(f"divisor.shape={tuple(divisor.shape)}, divisor.dtype={divisor.dtype} must be one float32")
