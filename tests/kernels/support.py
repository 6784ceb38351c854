"""What the kernel tests share: inputs, the comparison with the fp64 definition, and tolerances."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from kernels.lightning.reference import recurrence

# Relative error in norm that each input type may have against fp64 on the same (rounded) inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
WIDTHS = ((8, 8), (16, 48), (48, 64), (64, 80), (80, 96), (96, 128), (128, 192), (192, 256), (256, 16))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected| in fp64; NaN, which passes no comparison, where value is not finite."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def assert_close(names: str, values, expected, tolerance: float) -> None:
    errors = {n: relative_error(v, e) for n, v, e in zip(names.split(), values, expected, strict=True)}
    assert all(error <= tolerance for error in errors.values()), f"{errors} exceed {tolerance}"


def strided(x: Tensor) -> Tensor:
    """x as a column of a wider tensor, so that its last dimension is not contiguous."""
    return torch.stack((x + 1, x, x + 1), dim=-1)[..., 1]


@dataclass
class Attention:
    """Random inputs of lightning attention with output and state gradients, as leaves on one device."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    initial_state: Tensor
    cu_seqlens: Tensor | None
    do: Tensor
    dstate: Tensor

    @classmethod
    def random(cls, *, length=70, batch=2, widths=(16, 24), rates=(0.0, 0.02, 1.0), bounds=None, dtype=torch.float32,
               device="cpu", seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        heads, (key, value) = len(rates), widths
        batch = batch if bounds is None else 1
        rows = batch if bounds is None else len(bounds) - 1

        def draw(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            draw(batch, length, heads, key),
            draw(batch, length, heads, key),
            draw(batch, length, heads, value),
            torch.tensor(rates, dtype=torch.float32, device=device),
            draw(rows, heads, key, value, dtype=wide),
            None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device),
            draw(batch, length, heads, value),
            draw(rows, heads, key, value, dtype=wide),
        )

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v, self.initial_state)]

    def run(self) -> list[Tensor]:
        """o, state and the gradients of q, k, v and the initial state, of the operator under test."""
        q, k, v, begin = leaves = self.leaves()
        o, state = kernels.lightning_attention(
            q, k, v, self.decay, initial_state=begin, cu_seqlens=self.cu_seqlens, return_state=True
        )
        return [o, state, *torch.autograd.grad((o, state), leaves, (self.do, self.dstate))]

    def expected(self) -> list[Tensor]:
        """The same by the fp64 recurrence."""
        q, k, v, begin = leaves = [x.detach().double().cpu().requires_grad_() for x in self.leaves()]
        bounds = None if self.cu_seqlens is None else self.cu_seqlens.cpu()
        o, state = recurrence(q, k, v, self.decay.double().cpu(), initial_state=begin, cu_seqlens=bounds)
        return [
            o,
            state,
            *torch.autograd.grad((o, state), leaves, (self.do.double().cpu(), self.dstate.double().cpu())),
        ]

    def check(self, tolerance: float | None = None) -> None:
        assert_close("o state dq dk dv dinitial", self.run(), self.expected(), tolerance or TOLERANCE[self.q.dtype])

    def changed_by(self, document: int, before: list[Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """Run again after a change of one document's inputs: what is not this document's is as `before`, to the bit.
        Returns what is: (name, before, now) of each result."""
        place, found = slice(*self.cu_seqlens[document : document + 2].tolist()), []
        for name, old, new in zip(["o", "state", "dq", "dk", "dv", "dinitial"], before, self.run(), strict=True):
            inside = torch.zeros_like(old, dtype=torch.bool)
            inside[document if name in ("state", "dinitial") else (slice(None), place)] = True
            assert torch.equal(old[~inside], new[~inside]), name
            found.append((name, old[inside], new[inside]))
        return found

    def check_views(self) -> None:
        """Views of a fused projection, and a strided gradient, give the same bits as tensors of their own."""
        fused = torch.stack((self.q, self.k, self.v, self.v), dim=2).requires_grad_()
        q, k, v, _ = fused.unbind(2)
        o = kernels.lightning_attention(q, k, v, self.decay, cu_seqlens=self.cu_seqlens)
        o.backward(self.do.transpose(1, 2).contiguous().transpose(1, 2))
        self.initial_state.zero_()
        self.dstate.zero_()
        plain = self.run()
        assert torch.equal(o, plain[0])
        for got, expected in zip(fused.grad.unbind(2), plain[2:5], strict=False):
            assert torch.equal(got, expected)
