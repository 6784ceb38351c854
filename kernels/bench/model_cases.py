"""Benchmark cases of the output head with its loss, of whole layers, and of the optimizer update."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

import kernels
from kernels.adamw import reference as adamw_reference
from kernels.bench.cases import Case, random_inputs
from kernels.bench.peers import Peer
from kernels.cross_entropy import reference as head_reference
from kernels.newton_schulz import reference as ns_reference
from kernels.newton_schulz.op import parts


def cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """As `kernels.bench.cases.cases`."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = (16384, 64000) if gpu else (256, 2048)
    for width in (2048, 4096) if gpu else (64,):
        yield _head(65, 4096, width, dtype, device), _head(*size, width, dtype, device)
    for width in (2048, 4096) if gpu else (64,):
        yield _layer(65, width, dtype, device), _layer(16384 if gpu else 256, width, dtype, device)
    yield _adamw(4099, dtype, device), _adamw(2**28 if gpu else 2**20, dtype, device, in_place=True)
    for shape in ((16, 2048, 2048), (5, 5632, 2048), (4, 4096, 4096)) if gpu else ((4, 64, 96),):
        yield _newton_schulz((2, 520, 640), dtype, device), _newton_schulz(shape, dtype, device)


def _adamw(elements: int, dtype: torch.dtype, device: torch.device, *, in_place: bool = False) -> Case:
    """AdamW with fp32 masters and moments, clipping by a divisor, and a copy in `dtype`. in_place: update the inputs,
    as in the timed case; False: update copies, so that the definition gets the original inputs."""
    master, gradient, first, second = (torch.randn(elements, device=device) for _ in range(4))
    divisor = torch.full((), 2.0, device=device)
    copy = torch.empty(elements, dtype=dtype, device=device)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 100}

    def function(master: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        state = [x if in_place else x.clone() for x in (master, first, second)]
        kernels.adamw_(state[0], gradient, *state[1:], divisor=divisor, copy=copy, **settings)
        return tuple(state)

    def exact(master: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return adamw_reference.adamw(master, gradient / divisor, first, second, **settings)

    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = gradient
    theirs = torch.optim.AdamW([parameter], fused=True)
    theirs.grad_scale = divisor

    def torchs(*_: Tensor) -> None:
        theirs.step()
        copy.copy_(parameter)

    return Case(
        "adamw_",
        f"{elements} elements",
        function,
        [master, gradient, first, second.square()],
        [],
        exact,
        output_bytes=3 * master.nbytes + copy.nbytes,
        in_place=True,
        peers=(Peer("torch.optim.AdamW(fused=True), and the copy", torchs),),
    )


def _newton_schulz(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Lower bound: time of the products, the symmetric ones by half, one at a time in the inputs' type."""
    count, rows, columns = shape
    matrices = torch.randn(shape, dtype=dtype, device=device)
    wide = matrices if rows <= columns else matrices.mT
    gram, half = wide @ wide.mT, min(rows, columns) // 2

    def exact(x: Tensor) -> Tensor:
        return torch.stack([ns_reference.newton_schulz(one, 5) for one in x])

    def products() -> list[tuple[Tensor, ...]]:
        made = []
        for joined in parts(rows, columns, 5) if dtype.itemsize == 2 else [1] * 5:
            squares = [gram[:, :half] @ gram for _ in range(4 * joined - 3)]
            made.append((wide[:, :half] @ wide.mT, *squares, gram @ wide))
        return made

    def plain(x: Tensor) -> Tensor:
        with kernels.dispatch.backend("torch"):
            return kernels.newton_schulz(x)

    def torchs(x: Tensor) -> list[Tensor]:
        return [
            _zeropower_via_newtonschulz(one, (ns_reference.A, ns_reference.B, ns_reference.C), 5, 1e-7) for one in x
        ]

    return Case(
        "newton_schulz",
        f"{count} x {rows} x {columns}",
        kernels.newton_schulz,
        [matrices],
        [],
        exact,
        chained=True,
        output_bytes=matrices.nbytes,
        products=products,
        peers=(Peer("whole products, batched", plain), Peer("torch.optim.Muon's, one by one", torchs)),
    )


def _head(tokens: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Lower bound: time of the head's three matrix products, in the inputs' type."""
    targets = torch.randint(vocabulary, (tokens,), device=device)
    (hidden,) = random_inputs(1, tokens, width, dtype=dtype, device=device)
    weight = (torch.randn(vocabulary, width, dtype=dtype, device=device) * 0.02).requires_grad_()

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(hidden, weight, targets)[0]

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_reference.linear_cross_entropy(hidden, weight, targets)[0]

    def products() -> tuple[Tensor, ...]:
        h, w = hidden.detach(), weight.detach()
        logits = h @ w.T
        return logits, logits @ w, logits.T @ h

    return Case(
        "linear_cross_entropy",
        f"T {tokens} V {vocabulary} D {width}",
        function,
        [hidden, weight],
        [torch.ones((), device=device)],
        exact,
        products=products,
    )


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer: x + GLA(norm(x)), then x + GLU(norm(x)); called with x and its five weights.

    branch: x -> (x, norm(x)). add: x, update, square_sum -> (s, norm(s)), s = x + update / rms(square_sum). product:
    the GLU's elementwise product of its two projections.
    """

    heads: int
    decay: Tensor
    branch: Callable[[Tensor], tuple[Tensor, Tensor]]
    add: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    product: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, qkvu: Tensor, out: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        x, normed = self.branch(x)
        y, square_sum, _ = kernels.gla(F.linear(normed, qkvu), self.decay, act="silu")
        x, normed = self.add(x, F.linear(y, out), square_sum)
        return x + F.linear(self.product(F.linear(normed, w1), F.linear(normed, w2)), w3)


def _layer(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Ours: SimpleRMSNorm and SGLU. Peers: LayerNorm and SwiGLU, eager and with torch.compile. The GLU's hidden width
    is 8/3 of `width`, rounded up to a multiple of 128; rows have 2048 positions."""
    heads = max(width // 128, 1)
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    length = min(tokens, 2048)
    x = torch.randn(tokens // length, length, width, dtype=dtype, device=device).requires_grad_()
    glu = -(-8 * width // 3 // 128) * 128
    shapes = ((4 * width, width), (width, width), (glu, width), (glu, width), (width, glu))
    weights = [(torch.randn(s, dtype=dtype, device=device) * s[1] ** -0.5).requires_grad_() for s in shapes]
    scale, shift = (torch.randn(width, dtype=dtype, device=device).requires_grad_() for _ in range(2))

    def layer_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], scale, shift)

    def plain_branch(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, layer_norm(x)

    def plain_add(x: Tensor, update: Tensor, square_sum: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(square_sum / width + 1e-6).unsqueeze(-1)
        return plain_branch(x + (update * scale).to(x.dtype))

    def swiglu(a: Tensor, b: Tensor) -> Tensor:
        return F.silu(a) * b

    ours = _Layer(heads, decay, kernels.branch_simple_rms_norm, kernels.add_scaled_simple_rms_norm, kernels.sglu)
    theirs = _Layer(heads, decay, plain_branch, plain_add, swiglu)

    def products() -> list[Tensor]:
        # The 15 matrix products of forward and backward, one after the other.
        flat, made = x.detach().view(-1, width), []
        for weight in weights:
            w = weight.detach()
            rows = flat if w.shape[1] == width else flat.new_empty(flat.shape[0], w.shape[1])
            out = rows @ w.T
            made += [out, out @ w, out.T @ rows]
        return made

    peers = (
        Peer("LayerNorm and SwiGLU, PyTorch", theirs),
        Peer("LayerNorm and SwiGLU, compiled", torch.compile(theirs.__call__)),
        Peer("SimpleRMSNorm and SGLU, compiled", torch.compile(ours.__call__)),
    )
    return Case(
        "layer",
        f"T {tokens} D {width} F {glu}",
        ours,
        [x, *weights],
        [torch.randn_like(x)],
        ours,
        chained=True,
        peers=peers if device.type == "cuda" else peers[:1],
        products=products,
    )
