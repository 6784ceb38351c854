"""Compares the kernels with their definitions on this GPU, with this Triton version, at the model's widths.

A kernel that is right with one Triton version or GPU may be silently wrong with another. The check runs once, before
the first step.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.comparison import Check, compare
from kernels.cross_entropy import reference as cross_entropy_reference
from kernels.cross_entropy.op import linear_cross_entropy
from kernels.dispatch import capability_of
from kernels.embedding import reference as embedding_reference
from kernels.embedding.op import scaled_embedding
from kernels.gla.inputs import document_positions
from kernels.gla.op import gla
from kernels.lightning.op import lightning_attention
from kernels.lightning.sequences import few_positions
from kernels.newton_schulz import op as newton_schulz_op
from kernels.numerics import accumulation_dtype
from kernels.optimizer_checks import adamw_check, gram_check, muon_check
from kernels.quantize.many import ManyMatrices
from kernels.quantize.op import TYPES, largest, quantize, transpose
from kernels.rmsnorm import reference as rmsnorm_reference
from kernels.rmsnorm.op import add_rms_norm, branch_rms_norm
from kernels.rope import reference as rope_reference
from kernels.rope.op import rope
from kernels.sglu import reference as sglu_reference
from kernels.sglu.op import sglu, sglu_pair_backward, sglu_pair_forward
from kernels.srmsnorm import reference as srmsnorm_reference
from kernels.srmsnorm.op import add_scaled_simple_rms_norm, add_simple_rms_norm, simple_rms_norm

# dtheta is a sum of terms that cancel, so its relative error is larger.
LARGEST_THETA_ERROR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}

# Sizes of the inputs, to which the remainder by 16 of the run's sizes is added: Triton compiles one kernel for
# multiples of 16 and another for other sizes.
TOKENS = 64  # for operators that act per token, and of a chunk of the output head
VOCABULARY = 4096  # full tiles of the output head; the remainder is a partial one


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What the operators of a training step are given on this rank.

    heads, key_width, value_width: lightning attention; key_width = 2 value_width: gla is checked with LRPE. The norms
        are checked at width heads * value_width.
    glu_width: width of the gated product.
    embed_width: width of the embedding and the output head, over all ranks.
    act: the activation of q and k. glu_act: the gated product's.
    rope_base: of softmax attention, with heads of value_width: rope is checked in the place of lightning attention and
        gla; None: linear attention.
    theta_learnt: whether the gradient of LRPE's theta is checked.
    float8: whether the operators of fp8 products are checked.
    batch, length: sequences of a microbatch, and positions of one on this rank. Attention is checked on about 4096
        positions, for which Triton compiles the kernels of these sizes. The default is odd, and long enough to be cut
        into segments if there are few heads.
    packed: whether attention is checked on documents, packed into the one sequence.
    vocabulary: rows of the output head on this rank. The check's head has about 4096, aligned alike.
    """

    heads: int
    key_width: int
    value_width: int
    glu_width: int
    embed_width: int
    dtype: torch.dtype
    device: torch.device
    act: str = "silu"
    glu_act: str = "none"
    rope_base: float | None = None
    theta_learnt: bool = True
    float8: bool = False
    batch: int = 1
    length: int = 4097
    packed: bool = False
    vocabulary: int = 4099

    @property
    def width(self) -> int:
        return self.heads * self.value_width

    @property
    def tokens(self) -> int:
        """Rows of the inputs of operators that act per token."""
        return TOKENS + _remainder(self.batch * self.length)


def self_check(
    sizes: StepSizes, *, unused: Container[str] = (), fall_back: bool = False, order: int = 0
) -> dict[str, float]:
    """Compare the operators of a training step, forward and backward, with their fp64 definitions; return the largest
    relative error of each.

    unused: operators that the run does not call: they are not checked.
    fall_back: if an operator is wrong, log it, switch this process to plain PyTorch, and check again.
    order: of the checks, another number for each process of a machine: see `comparison.compare`.

    Raises KernelMismatchError, which names the operator, its error and the bound.
    """

    def used() -> Iterator[Check]:
        return (check for check in _checks(sizes) if check.operator not in unused)

    return compare(used, sizes.dtype, sizes.device, fall_back, order)


def _remainder(size: int) -> int:
    """1 to 16."""
    return (size - 1) % 16 + 1


def _checks(sizes: StepSizes) -> Iterator[Check]:
    yield from _attention_checks(sizes) if sizes.rope_base is None else _rope_check(sizes)
    yield from _norm_checks(sizes)
    if sizes.float8:
        yield from _float8_checks(sizes)
    yield from _vocabulary_checks(sizes)
    yield muon_check((sizes.tokens, sizes.width))
    if sizes.dtype in newton_schulz_op.HALF_TYPES:
        yield gram_check()
    yield adamw_check((sizes.tokens, sizes.width))


def _attention_checks(sizes: StepSizes) -> Iterator[Check]:
    heads, width = sizes.heads, sizes.value_width
    decay = torch.linspace(0, 1, heads, device=sizes.device)  # slow and fast heads in one call
    batch, length = few_positions(
        sizes.batch,
        sizes.length,
        capability=capability_of(decay),
        element_bytes=sizes.dtype.itemsize,
        heads=heads,
        key=sizes.key_width,
        value=width,
    )
    bounds, positions = None, torch.arange(length, device=sizes.device)
    if sizes.packed:
        bounds = torch.tensor([0, length // 3, length, length], dtype=torch.int32, device=sizes.device)
        positions = document_positions(bounds, length)
    with_lrpe = sizes.key_width == 2 * width

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, decay, cu_seqlens=bounds)

    def mixer(qkvu: Tensor, theta: Tensor | None) -> Tensor:
        """y / rms(o), which depends on both results, y and the sum of o^2."""
        y, square_sum, _ = gla(qkvu, decay, theta, act=sizes.act, positions=positions, cu_seqlens=bounds)
        scale = torch.rsqrt(square_sum / y.shape[-1] + 1e-6).unsqueeze(-1)
        return (y * scale).to(y.dtype)

    def of_qkvu(qkvu: Tensor) -> Tensor:
        j = torch.arange(heads * width, device=qkvu.device)
        return mixer(qkvu, (10000.0 ** (-j / j.numel())).view(heads, 1, width) if with_lrpe else None)

    def of_theta(theta: Tensor) -> Tensor:
        generator = torch.Generator(theta.device).manual_seed(1)
        qkvu = torch.randn((batch, length, 4 * heads * width), generator=generator, device=theta.device)
        return mixer(qkvu.to(sizes.dtype).to(theta.dtype), theta)

    key, value = (batch, length, heads, sizes.key_width), (batch, length, heads, width)
    # Definition: the chunked form in fp64, because the recurrence launches several kernels per position.
    yield Check("lightning_attention", attention, attention, (key, key, value))
    yield Check("gla", of_qkvu, of_qkvu, ((batch, length, 4 * heads * width),))
    if with_lrpe and sizes.theta_learnt:
        yield Check("gla_theta", of_theta, of_theta, ((heads, 1, width),), LARGEST_THETA_ERROR)


def _rope_check(sizes: StepSizes) -> Iterator[Check]:
    positions = torch.arange(sizes.tokens, device=sizes.device) * 101  # as far as the context of today's models
    options = {"head_dim": sizes.value_width, "base": sizes.rope_base}

    def rotated(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(rope(q, k, positions, **options), dim=-1)

    def exactly_rotated(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([rope_reference.rope(x, positions, **options) for x in (q, k)], dim=-1)

    yield Check("rope", rotated, exactly_rotated, ((1, sizes.tokens, sizes.width),) * 2)


def _norm_checks(sizes: StepSizes) -> Iterator[Check]:
    """Checks of the norms, without and with a weight and residual additions, and of the gated product."""
    norm = srmsnorm_reference.simple_rms_norm

    def added(x: Tensor, update: Tensor) -> Tensor:
        return torch.cat(add_simple_rms_norm(x, update), dim=-1)

    def exactly_added(x: Tensor, update: Tensor) -> Tensor:
        return torch.cat((x + update, norm(x + update)), dim=-1)

    def added_scaled(x: Tensor, update: Tensor) -> Tensor:
        square_sum = update.to(accumulation_dtype(update.dtype)).square().sum(-1)
        return torch.cat(add_scaled_simple_rms_norm(x, update, square_sum), dim=-1)

    def exactly_added_scaled(x: Tensor, update: Tensor) -> Tensor:
        return exactly_added(x, norm(update))

    def weighted(x: Tensor, weight: Tensor) -> Tensor:
        """Before a block, and after the last one, where no gradient of x itself arrives."""
        return torch.cat((*branch_rms_norm(x, weight), branch_rms_norm(x, weight)[1]), dim=-1)

    def exactly_weighted(x: Tensor, weight: Tensor) -> Tensor:
        y = rmsnorm_reference.rms_norm(x, weight)
        return torch.cat((x, y, y), dim=-1)

    def added_weighted(x: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        return torch.cat(add_rms_norm(x, update, weight), dim=-1)

    def exactly_added_weighted(x: Tensor, update: Tensor, weight: Tensor) -> Tensor:
        return torch.cat((x + update, rmsnorm_reference.rms_norm(x + update, weight)), dim=-1)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return sglu(a, b, sizes.glu_act)

    def exact_product(a: Tensor, b: Tensor) -> Tensor:
        return sglu_reference.sglu(a, b, sizes.glu_act)

    rows = (sizes.tokens, sizes.width)
    yield Check("simple_rms_norm", simple_rms_norm, norm, (rows,))
    yield Check("add_simple_rms_norm", added, exactly_added, (rows, rows))
    yield Check("add_scaled_simple_rms_norm", added_scaled, exactly_added_scaled, (rows, rows))
    yield Check("rms_norm", weighted, exactly_weighted, (rows, rows[1:]))
    yield Check("add_rms_norm", added_weighted, exactly_added_weighted, (rows, rows, rows[1:]))
    yield Check("sglu", product, exact_product, ((sizes.tokens, sizes.glu_width),) * 2)


def _float8_checks(sizes: StepSizes) -> Iterator[Check]:
    """Checks of the cast to fp8 and its transposes, and of the gated product of one tensor."""

    def quantized(x: Tensor) -> Tensor:
        (count, width), found = x.shape, []
        for dtype in TYPES:
            rows, transposed, scale = quantize(x, largest(x), dtype)
            again = transpose(rows)
            found += [rows[:, :width].float() * scale]
            found += [each[:width, :count].t().float() * scale for each in (transposed, again)]
        return torch.cat(found)

    def many(*matrices: Tensor) -> Tensor:
        found = ManyMatrices([[x.shape for x in matrices]], TYPES[0], matrices[0].device)
        found.quantize_([matrices])
        rows, transposed, scale = found.operands[0]
        return torch.cat((rows.float() * scale, transposed.t().float() * scale))

    def pair(x: Tensor) -> Tensor:
        product, bits = sglu_pair_forward(x, sizes.glu_act)
        gradient, gradient_bits = sglu_pair_backward(product, x, sizes.glu_act)
        most = torch.stack([found.amax().view(torch.float32) for found in (bits, gradient_bits)])
        return torch.cat((product.flatten(), gradient.flatten(), most.to(x.dtype)))

    def exact_pair(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        product = sglu_reference.sglu(*x.chunk(2, dim=-1), sizes.glu_act)
        (gradient,) = torch.autograd.grad(product, x, product.detach())
        return torch.cat(
            (product.flatten(), gradient.flatten(), product.abs().amax()[None], gradient.abs().amax()[None])
        )

    for width in (sizes.width, sizes.glu_width):
        yield Check(f"quantize_{width}", quantized, quantized, ((sizes.tokens, width),), differentiable=False)
    matrices = ((16 * sizes.tokens, 128), (16, 128))
    yield Check("quantize_many", many, many, matrices, differentiable=False)
    yield Check("sglu_pair", pair, exact_pair, ((sizes.tokens, 2 * sizes.glu_width),), differentiable=False)


def _vocabulary_checks(sizes: StepSizes) -> Iterator[Check]:
    """Checks of the embedding, with and without gradient sum, and of the output head with its loss."""
    width, device, vocabulary = sizes.embed_width, sizes.device, VOCABULARY + _remainder(sizes.vocabulary)
    small = 2.0 ** -(width.bit_length() // 2)  # scales logits to about 1; a power of two, so without rounding
    ids = torch.arange(sizes.tokens, device=device) // 2 * 63 % vocabulary
    targets = ids.masked_fill(ids % 5 == 1, -100)

    def embedding(weight: Tensor) -> Tensor:
        return scaled_embedding(ids, weight, 3.0)

    def exact_embedding(weight: Tensor) -> Tensor:
        return embedding_reference.scaled_embedding(ids, weight, 3.0)

    def gradient_sum(dy: Tensor) -> Tensor:
        total = torch.zeros(vocabulary, width, device=dy.device)
        torch.ops.megatron_tn.add_embedding_gradient_(total, dy.detach(), ids, 3.0, 0)
        return total

    def exact_gradient_sum(dy: Tensor) -> Tensor:
        return dy.new_zeros(vocabulary, width).index_add(0, ids, 3.0 * dy)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight * small, targets, chunk_tokens=TOKENS)[0]

    def exact_head(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_reference.linear_cross_entropy(hidden, weight * small, targets)[0]

    tokens, rows = (sizes.tokens, width), (vocabulary, width)
    yield Check("scaled_embedding", embedding, exact_embedding, (rows,))
    yield Check("scaled_embedding_sum", gradient_sum, exact_gradient_sum, (tokens,), differentiable=False)
    yield Check("linear_cross_entropy", head, exact_head, (tokens, rows))
