"""Random inputs of gated linear attention, run by the operator and by its fp64 definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels import dispatch
from kernels.gla import features, reference
from kernels.gla.inputs import GlaInputs, Saved
from kernels.gla.op import gradients
from kernels.quantize.noted import noted
from kernels.quantize.reference import largest
from tests.kernels.support import TOLERANCE, assert_close

# theta's gradient has a bound of its own.
THETA_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
NAMES = "y norm state dqkvu dinitial"


@dataclass
class Gated:
    """qkvu with theta (or None), and gradients for the three results."""

    qkvu: Tensor
    decay: Tensor
    theta: Tensor | None
    act: str
    gate: bool
    positions: Tensor
    initial_state: Tensor
    cu_seqlens: Tensor | None
    dy: Tensor
    dsquare_sum: Tensor
    dstate: Tensor

    @classmethod
    def random(cls, *, length=70, batch=2, width=16, rates=(0.0, 0.02, 1.0), with_lrpe=True, act="silu", gate=True,
               begin=0, bounds=None, dtype=torch.float32, device="cpu", seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        heads = len(rates)
        batch = batch if bounds is None else 1
        rows = batch if bounds is None else len(bounds) - 1

        def draw(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        key = width * (2 if with_lrpe else 1)
        theta = 10000.0 ** (-torch.arange(heads * width) / (heads * width))
        positions = torch.arange(length)
        bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        if bounds is not None:
            positions = positions - bounds.long()[torch.searchsorted(bounds, positions, right=True) - 1]
        case = cls(
            draw(batch, length, 4 * heads * width),
            torch.tensor(rates, dtype=torch.float32, device=device),
            theta.view(heads, 1, width).to(device, wide) if with_lrpe else None,
            act,
            gate,
            (positions + begin).to(device),
            draw(rows, heads, key, width, dtype=wide),
            None if bounds is None else bounds.to(device),
            draw(batch, length, heads * width),
            draw(batch, length, dtype=wide),
            draw(rows, heads, key, width, dtype=wide),
        )
        # As the norm behind the mixer gives it: o times this is of the size of the gate's own part of o's gradient.
        case.dsquare_sum *= 0.5 / case.square_sum().sqrt()
        return case

    def square_sum(self) -> Tensor:
        with torch.no_grad(), dispatch.backend("torch"):
            return kernels.gla(
                self.qkvu,
                self.decay,
                self.theta,
                act=self.act,
                gate=self.gate,
                positions=self.positions,
                initial_state=self.initial_state,
                cu_seqlens=self.cu_seqlens,
            )[1]

    def leaves(self) -> list[Tensor]:
        leaves = (self.qkvu, self.initial_state, self.theta)
        return [x.detach().clone().requires_grad_() for x in leaves if x is not None]

    def run(self) -> list[Tensor]:
        """y, the square sum, the state and the gradients of qkvu, the initial state and theta."""
        leaves = self.leaves()
        results = kernels.gla(
            leaves[0],
            self.decay,
            leaves[2] if self.theta is not None else None,
            act=self.act,
            gate=self.gate,
            positions=self.positions,
            initial_state=leaves[1],
            cu_seqlens=self.cu_seqlens,
            return_state=True,
        )
        return [*results, *torch.autograd.grad(results, leaves, (self.dy, self.dsquare_sum, self.dstate))]

    def exact(self) -> list[Tensor]:
        """The same by the recurrence and autograd, in fp64."""
        leaves = [x.detach().double().cpu().requires_grad_() for x in self.leaves()]
        results = reference.gla(
            leaves[0],
            self.decay.double().cpu(),
            leaves[2] if self.theta is not None else None,
            act=self.act,
            gate=self.gate,
            positions=self.positions.cpu(),
            initial_state=leaves[1],
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.cpu(),
        )
        gradients = [x.double().cpu() for x in (self.dy, self.dsquare_sum, self.dstate)]
        return [*results, *torch.autograd.grad(results, leaves, gradients)]

    def check(self, tolerance: float | None = None) -> None:
        dtype = self.qkvu.dtype
        got, wanted = self.run(), self.exact()
        got[1], wanted[1] = got[1].sqrt(), wanted[1].sqrt()
        assert_close(NAMES, got[:5], wanted[:5], tolerance or TOLERANCE[dtype])
        if self.theta is not None:
            assert_close("dtheta", got[5:], wanted[5:], tolerance or THETA_TOLERANCE[dtype])

    def check_without_positions(self) -> None:
        """None counts each document from 0, as each run alone would."""
        wanted, self.positions = self.exact(), None
        got = self.run()
        assert_close("state dqkvu dinitial dtheta", got[2:], wanted[2:], 1e-4)

    def check_state_alone(self) -> None:
        """The operator gla_state, as gla has it."""
        state = torch.ops.megatron_tn.gla_state(
            self.qkvu, self.features(keys_alone=True), *self.inputs()[1:4], *self.inputs()[5:]
        )
        assert_close("state", [state], [self.exact()[2]], TOLERANCE[self.qkvu.dtype])

    def inputs(self) -> GlaInputs:
        return GlaInputs(**{name: getattr(self, name) for name in GlaInputs._fields})

    def features(self, keys_alone: bool = False) -> Tensor | None:
        given = {"qkvu": self.qkvu, "theta": self.theta, "act": self.act, "positions": self.positions}
        return features.form_features(**given, heads=self.decay.shape[0], keys_alone=keys_alone)

    def check_exchange(self) -> None:
        """`gradients` where the final state's gradient comes in exchange for the initial one's."""
        ready = self.features(keys_alone=True)
        given = {"qkvu": self.qkvu, "theta": self.theta, "act": self.act, "positions": self.positions}
        features.add_query_features_(ready, **given)
        y, _, state, o, starts, _ = torch.ops.megatron_tn.gla_forward(self.qkvu, ready, *self.inputs()[1:], True)
        sent = []

        def exchange(dinitial: Tensor):
            assert (dinitial.shape, dinitial.dtype) == (self.dstate.shape, self.dstate.dtype)
            sent.append(dinitial.clone())
            return lambda: self.dstate

        saved = Saved(o=o if self.gate else y, starts=starts, features=ready, state=state)
        outputs = {"dy": self.dy, "dsquare_sum": self.dsquare_sum, "exchange": exchange}
        dqkvu, dtheta, _ = gradients(self.inputs(), saved, **outputs, theta_wanted=self.theta is not None)
        wanted = self.exact()
        assert_close("dqkvu", [dqkvu], wanted[3:4], TOLERANCE[self.qkvu.dtype])
        if self.theta is not None:
            assert_close("dtheta", [dtheta], wanted[5:], THETA_TOLERANCE[self.qkvu.dtype])
        self.dstate = torch.zeros_like(self.dstate)
        assert_close("dinitial", sent, self.exact()[4:5], TOLERANCE[self.qkvu.dtype])


def check_noted(device, **options) -> None:
    """The largest elements of y and of qkvu's gradient; results are those without."""
    found = []
    for noting in (False, True):
        case = Gated.random(device=device, **options)
        qkvu = case.qkvu.requires_grad_()
        y, square_sum, _ = kernels.gla(
            qkvu, case.decay, case.theta, act=case.act, gate=case.gate, cu_seqlens=case.cu_seqlens, noting=noting
        )
        (gradient,) = torch.autograd.grad((y, square_sum), qkvu, (case.dy, case.dsquare_sum))
        found.append((y, gradient))
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)
        assert noted(plain) is None
        assert torch.equal(noted(other.flatten(0, 1)).amax(), largest(other)[0])
