"""AdamW by this package's own kernel (kernels/adamw): one pass over masters, moments and gradients.

It clips on its way by a number that the host need not have seen, changes nothing where that is not finite, and leaves
the masters' copies in the computing type behind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import adamw_


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW's settings and state, but that `step` counts on the host.

    copies: master -> its copy, of the same shape, which every step writes. divisor: of the next step's gradients, a
    scalar on their device; None is one.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.copies: Mapping[Tensor, Tensor] = {}
        self.divisor: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise ValueError("closure: this optimizer takes gradients that are there already")
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue
                state = self.state_of(master)
                state["step"] += 1
                adamw_(
                    master,
                    master.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=int(state["step"]),
                    divisor=self.divisor,
                    copy=self.copies.get(master),
                )

    def state_of(self, master: Tensor) -> dict[str, Tensor]:
        """Moments of `master`, zero before its first step, and the number of its steps."""
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(master, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        return state

    def take_back(self) -> None:
        """The last step changed nothing: its divisor was not finite."""
        for state in self.state.values():
            state["step"] -= 1
