"""AdamW (arXiv 1711.05101) by the kernels of this package, torch or apex, each as an `optim.protocol.Optimizer`:

    m = beta1 m + (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    p -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)

t: number of applied steps.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import adamw_
from megatron_tn.optim.groups import set_rates
from megatron_tn.optim.protocol import masters_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Groups(torch.optim.Optimizer):
    """Holds the parameter groups and state of `TritonAdamW`, whose own `step` does the update."""

    def step(self, closure=None) -> None:
        """Allocates state only: DeepSpeed calls step() with zero gradients at initialisation."""
        for group in self.param_groups:
            for master in group["params"]:
                _moments(self, master)


class TritonAdamW:
    """See `optim.protocol.Optimizer`. One kernel divides the gradient and updates moments, master and copy
    (kernels/adamw): 30 bytes of traffic an element with a bf16 copy. The divisor stays on the device."""

    state_kinds = MOMENTS
    whole_matrices = False

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float):
        self.inner = _Groups(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.copies: Mapping[Tensor, Tensor] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor) -> None:
        self._steps += 1
        set_rates(self.inner, lr)
        for group in self.inner.param_groups:
            for master in group["params"]:
                state = self.state_of(master)
                adamw_(
                    master,
                    master.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=self._steps,
                    divisor=divisor,
                    copy=self.copies.get(master),
                )

    def undo(self) -> None:
        self._steps -= 1

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        return _moments(self.inner, master)

    def set_step(self, step: int) -> None:
        self._steps = step


class _Waiting:
    """Base of library optimizers: copies the divisor to the host (synchronises); writes copies in a separate pass."""

    state_kinds = MOMENTS
    whole_matrices = False
    inner: torch.optim.Optimizer

    def __init__(self) -> None:
        self.copies: Mapping[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor) -> None:
        value = divisor.item()
        if not value < float("inf"):
            return
        set_rates(self.inner, lr)
        self._apply(None if value == 1 else divisor)
        write_copies(self.copies)

    def _apply(self, divisor: Tensor | None) -> None:
        """One step of `inner` with gradients / divisor; None means 1."""
        raise NotImplementedError

    def undo(self) -> None:
        """Nothing to do: `step` has already skipped a divisor that is not finite."""

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        return _moments(self.inner, master)


class TorchAdamW(_Waiting):
    """See `optim.protocol.Optimizer`. torch.optim.AdamW with fused=True, whose kernel divides gradients by grad_scale
    as it reads them, and writes the quotients back."""

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__()
        self.inner = torch.optim.AdamW(groups, fused=True, lr=lr, betas=betas, eps=eps)

    def _apply(self, divisor: Tensor | None) -> None:
        self.inner.grad_scale = divisor
        torch.optim.AdamW.step(self.inner)  # not inner.step: DeepSpeed's adapter may have replaced that

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        moments = super().state_of(master)
        self.inner.state[master].setdefault("step", torch.zeros((), device=master.device))
        return moments

    def set_step(self, step: int) -> None:
        for state in self.inner.state.values():
            if "step" in state:
                state["step"].fill_(step)


class ApexAdamW(_Waiting):
    """See `optim.protocol.Optimizer`. NVIDIA apex's FusedAdam, which cannot divide gradients: clipping is a separate
    pass over them. FusedAdam counts steps per parameter group."""

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float):
        from apex.optimizers import FusedAdam

        super().__init__()
        self.inner = FusedAdam(groups, adam_w_mode=True, lr=lr, betas=betas, eps=eps)

    def _apply(self, divisor: Tensor | None) -> None:
        if divisor is not None:
            torch._foreach_mul_([master.grad for master in masters_of(self)], 1 / divisor)
        self.inner.step()

    def set_step(self, step: int) -> None:
        for group in self.inner.param_groups:
            group["step"] = step


def _moments(inner: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Both moments of `master`, allocated as zeros at first use."""
    state = inner.state[master]
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(master, requires_grad=False)
    return {moment: state[moment] for moment in MOMENTS}


@torch.no_grad()
def write_copies(copies: Mapping[Tensor, Tensor]) -> None:
    """Cast every master into its copy."""
    if copies:
        torch._foreach_copy_(list(copies.values()), list(copies))
