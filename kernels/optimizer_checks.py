"""Checks of the optimizers' kernels, see self_check.py. shape: of a matrix that is updated."""

import torch
from torch import Tensor

from kernels.adamw import reference as adamw_reference
from kernels.adamw.op import adamw_
from kernels.comparison import LARGEST_ERROR, Check
from kernels.muon import reference as muon_reference
from kernels.muon.op import muon_apply_, muon_direction_
from kernels.newton_schulz import op as newton_schulz_op
from kernels.newton_schulz import reference as newton_schulz_reference

# The optimizer's arithmetic is fp32 for every model type.
LARGEST_UPDATE_ERROR = dict.fromkeys(LARGEST_ERROR, 1e-6)


def gram_check() -> Check:
    """Check of gram_polynomial on matrices with singular values from 0 to 1.4, like those within the iterations."""
    rows = columns = newton_schulz_op.LEAST_ROWS + 8  # not whole tiles, but rows of whole 16 bytes, as models have them

    def polynomial(x: Tensor) -> Tensor:
        return newton_schulz_op.gram_polynomial(x.detach() / 32)

    def exact_polynomial(x: Tensor) -> Tensor:
        return newton_schulz_reference.gram_polynomial(x.detach() / 32)

    return Check("gram_polynomial", polynomial, exact_polynomial, ((2, rows, columns),), differentiable=False)


def muon_check(shape: tuple[int, int]) -> Check:
    settings = {"lr": 0.1, "scale": 9.0, "weight_decay": 0.1}

    def update(master: Tensor, gradient: Tensor, momentum: Tensor) -> Tensor:
        master, gradient, momentum = (x.detach().float().clone().view(-1) for x in (master, gradient, momentum))
        direction, copy, divisor = *torch.empty_like(momentum.expand(2, -1)), torch.full((), 2.0, device=master.device)
        muon_direction_(direction, momentum, gradient, beta=0.95, divisor=divisor)
        muon_apply_(master, direction, **settings, divisor=divisor, copy=copy)
        return torch.stack((momentum, direction, master, copy))

    def exact_update(master: Tensor, gradient: Tensor, momentum: Tensor) -> Tensor:
        momentum, direction = muon_reference.direction(momentum, gradient / 2, beta=0.95)
        master = muon_reference.apply(master, direction, **settings)
        return torch.stack((momentum, direction, master, master)).flatten(1)

    return Check("muon_", update, exact_update, (shape,) * 3, LARGEST_UPDATE_ERROR, differentiable=False)


def adamw_check(shape: tuple[int, int]) -> Check:
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3}

    def update(master: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        state = [x.detach().float().clone() for x in (master, first, second)]
        state[2].square_()
        divisor = torch.full((), 2.0, device=master.device)
        copy = torch.empty_like(state[0])
        adamw_(state[0], gradient.detach().float(), *state[1:], divisor=divisor, copy=copy, **settings)
        return torch.stack((*state, copy))

    def exact_update(master: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Tensor:
        state = adamw_reference.adamw(master, gradient / 2, first, second.square(), **settings)
        return torch.stack((*state, state[0]))

    return Check("adamw_", update, exact_update, (shape,) * 4, LARGEST_UPDATE_ERROR, differentiable=False)
