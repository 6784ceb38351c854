"""The embedding lookup times a constant, from a vocabulary whose rows may be split over ranks."""

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gradient_sum import GradientSum
from kernels.numerics import accumulation_dtype


def scaled_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: float = 1.0,
    *,
    row_start: int = 0,
    vocab_size: int | None = None,
    gradient_sum: GradientSum | None = None,
) -> Tensor:
    """weight[ids - row_start] * scale, in weight's type; zero for ids outside this rank's rows.

    ids: [...] int64, in 0 .. vocab_size - 1 (default of vocab_size: row_start + V_local).
    weight: [V_local, D], rows row_start .. row_start + V_local of the vocabulary.
    gradient_sum: dweight is added to it, only in the rows of `ids`; autograd gets None.
    Returns [..., D]; the sum over ranks is the lookup in the whole vocabulary. Differentiable in weight.
    Raises ValueError for shapes or types that do not fit and, on CPU, for ids outside the vocabulary. On a GPU ids are
    not checked (no host synchronisation): such ids give zero.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"ids.dtype={ids.dtype} must be int64")
    if weight.dim() != 2 or not torch.is_floating_point(weight):
        raise ValueError(f"weight.shape={tuple(weight.shape)}, weight.dtype={weight.dtype} must be [V, D], floating")
    if row_start < 0:
        raise ValueError(f"row_start={row_start} must be >= 0")
    vocab_size = row_start + weight.shape[0] if vocab_size is None else vocab_size
    if gradient_sum is not None:
        return _AddedEmbedding.apply(ids, weight, scale, row_start, vocab_size, gradient_sum)
    return torch.ops.megatron_tn.scaled_embedding(ids, weight, scale, row_start, vocab_size)


@torch.library.custom_op("megatron_tn::scaled_embedding", mutates_args=())
def _forward(ids: Tensor, weight: Tensor, scale: float, row_start: int, vocab_size: int) -> Tensor:
    if not ids.is_cuda and (wrong := ids[(ids < 0) | (ids >= vocab_size)]).numel():
        raise ValueError(f"ids holds {int(wrong[0])}, which is not in 0 .. vocab_size - 1 = {vocab_size - 1}")
    if dispatch.choose("scaled_embedding", weight) == "triton":
        from kernels.embedding import triton_embedding

        return triton_embedding.forward(ids=ids, weight=weight, scale=scale, row_start=row_start)
    rows, elsewhere = _local(ids, weight.shape[0], row_start)
    return (weight[rows] * scale).masked_fill_(elsewhere.unsqueeze(-1), 0)


@torch.library.custom_op("megatron_tn::scaled_embedding_backward", mutates_args=())
def _backward(dy: Tensor, ids: Tensor, vocabulary: int, scale: float, row_start: int) -> Tensor:
    """dweight [vocabulary, D], by PyTorch's own operator, which sorts the ids: deterministic."""
    rows, elsewhere = _local(ids, vocabulary, row_start)
    # On a CPU PyTorch sums in dy's type; a bf16 sum of ones stops growing at 256.
    wide = dy if dy.is_cuda else dy.to(accumulation_dtype(dy.dtype))
    wide = (wide * scale).masked_fill_(elsewhere.unsqueeze(-1), 0)
    return torch.ops.aten.embedding_dense_backward(wide, rows, vocabulary, -1, False).to(dy.dtype)


@_forward.register_fake
def _forward_fake(ids, weight, scale, row_start, vocab_size):
    return weight.new_empty(*ids.shape, weight.shape[1])


@_backward.register_fake
def _backward_fake(dy, ids, vocabulary, scale, row_start):
    return dy.new_empty(vocabulary, dy.shape[-1])


def _save(ctx, inputs, output):
    ids, weight, ctx.scale, ctx.row_start, _ = inputs
    ctx.vocabulary = weight.shape[0]  # not the weight, which ZeRO 3 has released by the backward pass
    ctx.save_for_backward(ids)


def _differentiate(ctx, dy):
    (ids,) = ctx.saved_tensors
    dweight = torch.ops.megatron_tn.scaled_embedding_backward(dy, ids, ctx.vocabulary, ctx.scale, ctx.row_start)
    return None, dweight, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _AddedEmbedding(torch.autograd.Function):
    """The lookup whose backward pass adds dweight to a GradientSum."""

    @staticmethod
    def forward(ctx, ids, weight, scale, row_start, vocab_size, gradient_sum):
        ctx.save_for_backward(ids)
        ctx.scale, ctx.row_start, ctx.gradient_sum = scale, row_start, gradient_sum
        return torch.ops.megatron_tn.scaled_embedding(ids, weight, scale, row_start, vocab_size)

    @staticmethod
    def backward(ctx, dy):
        torch.ops.megatron_tn.add_embedding_gradient_(
            ctx.gradient_sum.begun(), dy, *ctx.saved_tensors, ctx.scale, ctx.row_start
        )
        return None, None, None, None, None, None


@torch.library.custom_op("megatron_tn::add_embedding_gradient_", mutates_args=("total",))
def _add_gradient_(total: Tensor, dy: Tensor, ids: Tensor, scale: float, row_start: int) -> None:
    """total [V, D] fp32 += dweight; deterministic."""
    if dispatch.choose("scaled_embedding", total) == "triton":
        from kernels.embedding import triton_embedding

        triton_embedding.add_gradient_(total, dy=dy, ids=ids, scale=scale, row_start=row_start)
        return
    rows, elsewhere = _local(ids, total.shape[0], row_start)
    wide = (dy.to(total.dtype) * scale).masked_fill_(elsewhere.unsqueeze(-1), 0)
    if total.is_cuda:  # index_add_ on CUDA is not deterministic
        total += torch.ops.aten.embedding_dense_backward(wide, rows, total.shape[0], -1, False)
    else:
        total.index_add_(0, rows.flatten(), wide.flatten(0, -2))


@_add_gradient_.register_fake
def _add_gradient_fake(total, dy, ids, scale, row_start):
    return None


def _local(ids: Tensor, vocabulary: int, row_start: int) -> tuple[Tensor, Tensor]:
    """The row of each id in this rank's weight, 0 where another rank holds it; and a mask of such ids."""
    rows = ids - row_start
    elsewhere = (rows < 0) | (rows >= vocabulary)
    return rows.masked_fill(elsewhere, 0), elsewhere
