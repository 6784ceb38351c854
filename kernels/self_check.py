"""The kernels judged where they are about to be used: on this device and compiler, at the model's own widths.

A kernel that is right in one version of Triton, or on one GPU, may be wrong in the next without a word. A few
milliseconds before the first step show it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import dispatch
from kernels.adamw import reference as adamw_reference
from kernels.adamw.op import adamw_
from kernels.cross_entropy import reference as cross_entropy_reference
from kernels.cross_entropy.op import linear_cross_entropy
from kernels.embedding import reference as embedding_reference
from kernels.embedding.op import scaled_embedding
from kernels.lightning.gla import gla
from kernels.lightning.op import lightning_attention
from kernels.numerics import accumulation_dtype
from kernels.sglu import reference as sglu_reference
from kernels.sglu.op import sglu
from kernels.srmsnorm import reference as srmsnorm_reference
from kernels.srmsnorm.op import add_scaled_simple_rms_norm, add_simple_rms_norm, simple_rms_norm

logger = logging.getLogger(__name__)

# Relative error in norm against fp64 that each type may have: the bounds that the tests hold the kernels to.
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# theta's gradient is a sum of terms that cancel; its bounds are its own.
LARGEST_THETA_ERROR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
# The optimizer's arithmetic is fp32, whatever the model's type.
LARGEST_UPDATE_ERROR = dict.fromkeys(LARGEST_ERROR, 1e-6)

TOKENS = 65  # of the operators that see a token at a time
VOCABULARY = 4099  # some whole tiles of the head, and a part of one


class KernelMismatchError(RuntimeError):
    """A kernel disagrees with its definition on this device."""


@dataclass(frozen=True)
class _Check:
    operator: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]  # the same in fp64
    shapes: tuple[tuple[int, ...], ...]
    bounds: Mapping[torch.dtype, float] = field(default_factory=lambda: LARGEST_ERROR)
    differentiable: bool = True


def self_check(
    *,
    heads: int,
    key_width: int,
    value_width: int,
    glu_width: int,
    dtype: torch.dtype,
    device: torch.device,
    embed_width: int | None = None,
    act: str = "silu",
    decay: Tensor | None = None,
    length: int = 4097,
    fall_back: bool = False,
) -> dict[str, float]:
    """Compare the operators of a training step, forward and backward, with their fp64 definitions; returns each one's
    largest error.

    heads, key_width, value_width: of lightning attention on this rank (key_width doubled in a layer with LRPE).
        The norms are checked at width heads * value_width, the gated product at glu_width, and gated linear attention
        with heads of value_width, with LRPE where key_width is twice that.
    embed_width: of the embedding and the head, which hold heads of all ranks (default: heads * value_width).
    act: the activation of q and k.
    decay: [heads], the rates (default: from 0 to 1, slow and fast heads at once).
    length: positions; the default is odd and long enough that few heads are cut into segments.
    fall_back: where one is wrong, log it, have every operator run in PyTorch from here on, and check that instead.

    Raises KernelMismatchError naming the operator, its error and the bound.
    """
    if decay is None:
        decay = torch.linspace(0, 1, heads, device=device)
    embed_width = embed_width or heads * value_width
    errors = {}
    for check in _checks(heads, key_width, value_width, glu_width, embed_width, act, decay, length, dtype):
        error = errors[check.operator] = _worst_error(check, dtype, device)
        if error <= check.bounds[dtype]:  # NaN is not
            continue
        message = (
            f"{check.operator} at {check.shapes} in {dtype} on {device} is off by {error:.1e} relative to fp64, "
            f"more than {check.bounds[dtype]:.0e}"
        )
        if not fall_back or dispatch.requested_backend() == "torch":
            raise KernelMismatchError(message)
        logger.error("%s; all operators run in PyTorch from here on", message)
        dispatch.set_backend("torch")
        return self_check(
            heads=heads,
            key_width=key_width,
            value_width=value_width,
            glu_width=glu_width,
            dtype=dtype,
            device=device,
            embed_width=embed_width,
            act=act,
            decay=decay,
            length=length,
        )
    return errors


def _checks(
    heads: int,
    key_width: int,
    value_width: int,
    glu_width: int,
    embed_width: int,
    act: str,
    decay: Tensor,
    length: int,
    dtype: torch.dtype,
) -> Iterator[_Check]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, decay)

    with_lrpe = key_width == 2 * value_width

    def mixer(qkvu: Tensor, theta: Tensor | None = None) -> Tensor:
        y, square_sum, _ = gla(qkvu, decay, theta, act=act)
        scale = torch.rsqrt(square_sum / y.shape[-1] + 1e-6).unsqueeze(-1)
        return (y * scale).to(y.dtype)

    def mixer_with_lrpe(qkvu: Tensor) -> Tensor:
        j = torch.arange(heads * value_width, device=qkvu.device)
        return mixer(qkvu, (10000.0 ** (-j / j.numel())).view(heads, 1, value_width))

    def of_theta(theta: Tensor) -> Tensor:
        generator = torch.Generator(theta.device).manual_seed(1)
        qkvu = torch.randn((1, length, 4 * heads * value_width), generator=generator, device=theta.device)
        return mixer(qkvu.to(dtype).to(theta.dtype), theta)

    def residual_norm(x: Tensor, update: Tensor) -> Tensor:
        return torch.cat(add_simple_rms_norm(x, update), dim=-1)

    def exact_residual_norm(x: Tensor, update: Tensor) -> Tensor:
        return torch.cat((x + update, srmsnorm_reference.simple_rms_norm(x + update)), dim=-1)

    def scaled_norm(x: Tensor, update: Tensor) -> Tensor:
        square_sum = update.to(accumulation_dtype(update.dtype)).square().sum(-1)
        return torch.cat(add_scaled_simple_rms_norm(x, update, square_sum), dim=-1)

    def exact_scaled_norm(x: Tensor, update: Tensor) -> Tensor:
        return exact_residual_norm(x, srmsnorm_reference.simple_rms_norm(update))

    # Logits of the size of one, by a factor that rounds nothing.
    small = 2.0 ** -(embed_width.bit_length() // 2)
    ids = torch.arange(TOKENS, device=decay.device) // 2 * 63 % VOCABULARY
    targets = ids.masked_fill(ids % 5 == 1, -100)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight * small, targets, chunk_tokens=TOKENS // 2)[0]

    def exact_head(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_reference.linear_cross_entropy(hidden, weight * small, targets)[0]

    def embedding(weight: Tensor) -> Tensor:
        return scaled_embedding(ids, weight, 3.0)

    def exact_embedding(weight: Tensor) -> Tensor:
        return embedding_reference.scaled_embedding(ids, weight, 3.0)

    def added_embedding(dy: Tensor) -> Tensor:
        total = torch.zeros(VOCABULARY, embed_width, device=dy.device)
        torch.ops.megatron_tn.add_embedding_gradient_(total, dy.detach(), ids, 3.0, 0)
        return total

    def exact_added_embedding(dy: Tensor) -> Tensor:
        return dy.new_zeros(VOCABULARY, embed_width).index_add(0, ids, 3.0 * dy)

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

    key, value = (1, length, heads, key_width), (1, length, heads, value_width)
    rows = (TOKENS, heads * value_width)
    yield _Check("lightning_attention", attention, attention, (key, key, value))
    fused = (1, length, 4 * heads * value_width)
    yield _Check("gla", *(2 * [mixer_with_lrpe if with_lrpe else mixer]), (fused,))
    if with_lrpe:
        theta = (heads, 1, value_width)
        yield _Check("gla_theta", of_theta, of_theta, (theta,), LARGEST_THETA_ERROR)
    yield _Check("simple_rms_norm", simple_rms_norm, srmsnorm_reference.simple_rms_norm, (rows,))
    yield _Check("add_simple_rms_norm", residual_norm, exact_residual_norm, (rows, rows))
    yield _Check("add_scaled_simple_rms_norm", scaled_norm, exact_scaled_norm, (rows, rows))
    yield _Check("sglu", sglu, sglu_reference.sglu, ((TOKENS, glu_width),) * 2)
    vocabulary = (VOCABULARY, embed_width)
    yield _Check("scaled_embedding", embedding, exact_embedding, (vocabulary,))
    tokens = (TOKENS, embed_width)
    yield _Check("added_embedding", added_embedding, exact_added_embedding, (tokens,), differentiable=False)
    yield _Check("linear_cross_entropy", head, exact_head, (tokens, vocabulary))
    yield _Check("adamw", update, exact_update, (rows,) * 4, LARGEST_UPDATE_ERROR, differentiable=False)


def _worst_error(check: _Check, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error in norm of the output and the inputs' gradients, on fixed random inputs."""
    generator = torch.Generator(device).manual_seed(0)  # of its own: training's random state stays as it is

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = [draw(shape).requires_grad_() for shape in check.shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = check.function(*inputs)
        gradient = draw(out.shape)
        values = (out, *(torch.autograd.grad(out, inputs, gradient) if check.differentiable else ()))
        with dispatch.backend("torch"):  # lightning attention is judged by its chunked form, free of kernels
            wanted = check.definition(*exact)
            gradients = torch.autograd.grad(wanted, exact, gradient.double()) if check.differentiable else ()
            expected = (wanted, *gradients)
    errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(values, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")
