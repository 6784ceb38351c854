"""Compares the kernels of decoding steps with their definitions on this GPU, at the model's widths, before decoding."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels import dispatch
from kernels.comparison import LARGEST_ERROR, Check, compare
from kernels.float8_linear.op import MOST_ROWS, float8_linear
from kernels.float8_linear.reference import dequantized, quantize_rows
from kernels.gla.buffered import gla_step_buffered_
from kernels.gla.op import gla
from kernels.gla.step import gla_step_
from kernels.gla.step_buffer import StepBuffer
from kernels.numerics import accumulation_dtype
from kernels.sampling.op import sample_tokens
from kernels.token import reference
from kernels.token.op import token_glu, token_linear

ROWS, SLOTS = 2, 4  # B of the states, and W of their buffer
PRODUCT_ROWS = 257  # rows of a weight
FLOAT8_ROWS, MANY_ROWS = 70, MOST_ROWS + 1  # rows of a weight in fp8, and of the x it is multiplied with
DRAWS, VOCABULARY = 64, 4099
MOST_DIFFERENT_DRAWS = 0.05  # rounding to fp32 moves the border between two tokens
EPS = 1e-6


def decoding_check(
    *,
    heads: int,
    key_width: int,
    value_width: int,
    glu_width: int,
    embed_width: int,
    dtype: torch.dtype,
    device: torch.device,
    act: str = "silu",
    glu_act: str = "none",
    linear: bool = True,
    float8: bool = False,
    fall_back: bool = False,
) -> dict[str, float]:
    """Compare the operators of a decoding step with their fp64 definitions; return the largest relative error of each.

    heads, key_width, value_width, glu_width, embed_width, act, glu_act: as in `self_check`. linear: whether the model
    has linear attention, whose steps are checked, with LRPE where key_width = 2 value_width.
    float8: whether weights are kept in fp8, and products with them are checked, too.
    fall_back: if an operator is wrong, log it, switch this process to plain PyTorch, and check again.

    Raises KernelMismatchError, which names the operator, its error and the bound.
    """

    def checks() -> Iterator[Check]:
        if linear:
            decay = torch.linspace(0, 1, heads, device=device)
            yield from _step_checks(key_width, value_width, act, decay)
        yield from _product_checks(embed_width, glu_width, glu_act)
        if float8:
            yield from _float8_checks(embed_width, glu_width, glu_act)
        yield _sampling_check(device)

    return compare(checks, dtype, device, fall_back)


def _step_checks(key_width: int, width: int, act: str, decay: Tensor) -> Iterator[Check]:
    """One step over its state, and SLOTS + 1 buffered ones, of which one folds; y, the sum of o^2, and the state."""
    heads = len(decay)
    j = torch.arange(heads * width, device=decay.device)
    theta = (10000.0 ** (-j / j.numel())).view(heads, 1, width) if key_width == 2 * width else None

    def of_type(x: Tensor) -> Tensor | None:
        return None if theta is None else theta.to(x.dtype)

    def results(y: Tensor, square_sum: Tensor, state: Tensor) -> Tensor:
        return torch.cat([part.to(state.dtype).flatten() for part in (y, square_sum.sqrt(), state)])

    def written_over(qkvu: Tensor, state: Tensor) -> Tensor:
        qkvu, state = qkvu.detach(), state.detach().to(accumulation_dtype(qkvu.dtype))
        y, sums = gla_step_(qkvu, state, decay, of_type(qkvu), act, True, None)
        return results(y, sums.sum(-1), state)

    def buffered(qkvu: Tensor, state: Tensor) -> Tensor:
        qkvu, state = qkvu.detach(), state.detach().to(accumulation_dtype(qkvu.dtype))
        slot, start = (torch.zeros(n, dtype=torch.int64, device=decay.device) for n in (1, ROWS))
        buffer = StepBuffer.around(state, SLOTS, qkvu.dtype, slot, start)
        found = []
        for t in range(qkvu.shape[1]):
            buffer = buffer._replace(fold=t % SLOTS == SLOTS - 1)
            position = torch.full((1,), t, device=decay.device)
            token = qkvu[:, t : t + 1]
            found.append(gla_step_buffered_(token, *buffer, decay, of_type(qkvu), act, True, position))
            buffer.advance()
        return results(*(torch.cat(part, 1) for part in zip(*found, strict=True)), buffer.folded(decay))

    def definition(qkvu: Tensor, state: Tensor) -> Tensor:
        return results(*gla(qkvu, decay, of_type(qkvu), act=act, initial_state=state, return_state=True))

    state = (ROWS, heads, key_width, width)
    for operator, function, tokens in (("gla_step_", written_over, 1), ("gla_step_buffered_", buffered, SLOTS + 1)):
        qkvu = (ROWS, tokens, 4 * heads * width)
        yield Check(operator, function, definition, (qkvu, state), differentiable=False)


def _product_checks(embed_width: int, glu_width: int, glu_act: str) -> Iterator[Check]:
    def linear(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        x, weight, residual = x.detach(), weight.detach(), residual.detach()
        parts = x.to(accumulation_dtype(x.dtype)).square().view(2, -1).sum(-1)
        normed = token_linear(x, weight, eps=EPS)
        return torch.cat((normed, token_linear(x, weight, eps=EPS, square_sum=parts, residual=residual)))

    def exact_linear(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        normed = reference.token_linear(x, weight, eps=EPS)
        return torch.cat((normed, normed + residual))

    def glu(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        return token_glu(x.detach(), gate.detach(), value.detach(), eps=EPS, act=glu_act)

    def exact_glu(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        return reference.token_glu(x, gate, value, eps=EPS, act=glu_act)

    width, weight = (embed_width,), (PRODUCT_ROWS, embed_width)
    yield Check("token_linear", linear, exact_linear, (width, weight, (PRODUCT_ROWS,)), differentiable=False)
    gate = (glu_width, embed_width)
    yield Check("token_glu", glu, exact_glu, (width, gate, gate), differentiable=False)


def _float8_checks(embed_width: int, glu_width: int, glu_act: str) -> Iterator[Check]:
    """Both sides quantise the same weights; the definition takes the numbers that fp8 and scales stand for."""

    def exact(weight: Tensor) -> Tensor:
        return dequantized(*quantize_rows(weight), weight.dtype)

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        data, scale = quantize_rows(weight.detach())
        few, many = x.detach()[:ROWS], x.detach()
        alone = token_linear(few[0], data, weight_scale=scale, eps=EPS)
        return torch.cat((alone[None], float8_linear(few, data, scale), float8_linear(many, data, scale)))

    def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
        alone, rows = reference.token_linear(x[0], exact(weight), eps=EPS), x @ exact(weight).t()
        return torch.cat((alone[None], rows[:ROWS], rows))

    def glu(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        (gate, gate_scale), (value, value_scale) = quantize_rows(gate.detach()), quantize_rows(value.detach())
        scales = {"gate_scale": gate_scale, "value_scale": value_scale}
        return token_glu(x.detach(), gate, value, **scales, eps=EPS, act=glu_act)

    def exact_glu(x: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        return reference.token_glu(x, exact(gate), exact(value), eps=EPS, act=glu_act)

    gate = (glu_width, embed_width)
    shapes = (MANY_ROWS, embed_width), (FLOAT8_ROWS, embed_width)
    yield Check("float8_linear", linear, exact_linear, shapes, differentiable=False)
    yield Check("token_glu of fp8 weights", glu, exact_glu, ((embed_width,), gate, gate), differentiable=False)


def _sampling_check(device: torch.device) -> Check:
    """The share of draws that are those of plain PyTorch."""
    rows = torch.arange(DRAWS, device=device)
    given = {"top_k": rows % 5 * 10, "temperature": (rows % 3) / 2.0, "top_p": 1 - (rows % 2) / 5.0}
    given |= {name: given[name].double() for name in ("temperature", "top_p")}

    def draw(logits: Tensor) -> Tensor:
        return sample_tokens(logits, rows * 987_654_321, rows, **given, candidates=VOCABULARY, nucleus=True)

    def agreement(logits: Tensor) -> Tensor:
        logits = 3 * logits.detach()
        with dispatch.backend("torch"):
            wanted = draw(logits)
        return (draw(logits) == wanted).double().mean()

    def whole(logits: Tensor) -> Tensor:
        return logits.new_ones(())

    bounds = dict.fromkeys(LARGEST_ERROR, MOST_DIFFERENT_DRAWS)
    return Check("sample_tokens", agreement, whole, ((DRAWS, VOCABULARY),), bounds, differentiable=False)
