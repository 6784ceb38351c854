"""Cross-entropy of a linear head, vocabulary-parallel or not, in chunks of tokens: no tensor of all logits."""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.cross_entropy.steps import add_weight_gradient, head_exponentials, head_gradient_, head_totals_
from kernels.gradient_sum import GradientSum
from kernels.numerics import accumulation_dtype, product


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    gradient_sum: GradientSum | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of -log softmax(hidden weight^T)[target], in nats, and each token's loss.

    hidden: [T, D]. weight: [V_local, D], this rank's rows vocab_start .. vocab_start + V_local of the padded
        vocabulary. Both of one floating type.
    targets: [T] int64, global token ids, or ignore_index for tokens without a loss.
    vocab_size: the true vocabulary (default: all rows of all ranks). Rows beyond it are padding: not in the softmax,
        with a gradient of zero.
    group: the ranks that hold the vocabulary's other rows; None: this process holds all rows.
    chunk_tokens: tokens per chunk of logits (default: `default_chunk_tokens`).
    gradient_sum: dweight is added to it, in fp32; autograd gets None.

    Returns (loss_sum, token_losses [T]), fp32 (fp64 for fp64 inputs), equal on all ranks of the group. loss_sum is
    differentiable in hidden and weight; token_losses, 0 where ignored, is not. The forward pass computes the gradients
    chunk by chunk; the backward pass only scales them. dhidden is this rank's term, which the caller sums over the
    group; dweight is summed over chunks in fp32.
    Raises ValueError for shapes or types that do not fit and, on CPU, for targets outside the vocabulary. On a GPU
    targets are not checked (no host synchronisation): the loss of such a target lacks its logit.
    """
    _check(hidden, weight, targets, vocab_start, chunk_tokens)
    ranks = 1 if group is None else group.size()
    held = weight.shape[0] * ranks
    vocab_size = held if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= held:
        raise ValueError(
            f"vocab_size={vocab_size} must be >= 1 and at most the {held} rows that {ranks} x weight.shape[0] makes"
        )
    chunk = chunk_tokens or default_chunk_tokens(hidden.shape[0], weight.shape[0], hidden.is_cuda)
    target_rows, has_loss = torch.ops.megatron_tn.local_targets(
        targets, ignore_index, vocab_start, min(weight.shape[0], max(vocab_size - vocab_start, 0)), vocab_size
    )
    return _LinearCrossEntropy.apply(
        hidden,
        weight,
        target_rows,
        has_loss,
        vocab_size - vocab_start,
        group if ranks > 1 else None,
        chunk,
        torch.is_grad_enabled(),
        gradient_sum,
    )


def default_chunk_tokens(tokens: int, rows: int, cuda: bool) -> int:
    """Tokens per chunk, for `tokens` in all and `rows` rows of the weight.

    On a GPU tokens / 8 - 64: the chunk's bf16 logits and their sums then take less than an eighth of all logits. On a
    CPU, where logits may be fp32, tokens / 32. At least 2^24 logits on a GPU and 2^21 on a CPU, to occupy the machine.
    """
    # Not tokens / 9: 1820 tokens take as many waves of tiles as 2048, so a smaller chunk is not faster.
    part = (tokens // 8 - 1) // 64 * 64 if cuda else -(-tokens // 32)
    return min(tokens, max(part, 2 ** (24 if cuda else 21) // rows, 1))


@torch.library.custom_op("megatron_tn::local_targets", mutates_args=())
def _local_targets(
    targets: Tensor, ignore_index: int, vocab_start: int, rows: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """For each target: row in this rank's weight (-1: another rank's row, or ignored), and whether it has a loss."""
    has_loss = targets != ignore_index
    if not targets.is_cuda:
        wrong = has_loss & ((targets < 0) | (targets >= vocab_size))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"targets[{at}]={int(targets[at])} is neither ignore_index={ignore_index} nor in "
                f"0 .. vocab_size - 1 = {vocab_size - 1}"
            )
    row = targets - vocab_start
    return torch.where(has_loss & (row >= 0) & (row < rows), row, -1), has_loss


@_local_targets.register_fake
def _local_targets_fake(targets, ignore_index, vocab_start, rows, vocab_size):
    return torch.empty_like(targets), torch.empty_like(targets, dtype=torch.bool)


class _LinearCrossEntropy(torch.autograd.Function):
    # Not a registered operator, because it takes a process group. It calls registered operators, whose products
    # PyTorch's FLOP counter counts.
    @staticmethod
    def forward(ctx, hidden, weight, target_rows, has_loss, true_rows, group, chunk, grad_enabled, gradient_sum):
        wide = accumulation_dtype(hidden.dtype)
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.empty(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        losses, scales = [], []

        hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
        columns = min(max(true_rows, 0), weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            piece = slice(start, start + chunk)
            h, rows = hidden[piece], target_rows[piece]
            exponentials, reference, target_logits, highest, sums = head_exponentials(h, weight, rows, columns)
            if group is not None:
                dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            reference, total = head_totals_(exponentials, sums, reference, h, weight, highest, columns)
            if group is not None:
                both = torch.stack((total, target_logits))
                dist.all_reduce(both, group=group)
                total, target_logits = both.unbind()
            normalizer = highest + total.log()
            losses.append((normalizer - target_logits).masked_fill_(~has_loss[piece], 0))
            same_type = exponentials.dtype == hidden.dtype
            if needs_hidden or needs_weight:
                # hidden / Z shares memory with this chunk's dhidden, written after dweight has read hidden / Z.
                scaled = dhidden[piece] if needs_hidden and same_type else torch.empty_like(h, dtype=exponentials.dtype)
                scale = head_gradient_(
                    exponentials, scaled, h, rows, has_loss[piece], reference, normalizer, target_logits
                )
                scales.append(scale)
            if needs_weight:
                add_weight_gradient(dweight, exponentials, scaled, first=start == 0)
            if needs_hidden and same_type:
                torch.mm(exponentials, weight, out=dhidden[piece])
            elif needs_hidden:  # multiplied by 1 / Z before rounding to hidden's type
                dhidden[piece] = product(exponentials, weight.to(wide)) * scale[:, None]
                scale.fill_(1)
            del exponentials  # frees them before the next chunk's are allocated

        ctx.save_for_backward(dhidden, dweight, torch.cat(scales) if needs_hidden else None)
        ctx.dtype, ctx.gradient_sum = weight.dtype, gradient_sum
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, dloss, _):
        dhidden, dweight, scales = ctx.saved_tensors
        if dhidden is not None:
            dhidden = torch.ops.megatron_tn.head_scaled(dhidden, dloss, scales, dhidden.dtype)
        if dweight is not None and ctx.gradient_sum is not None:
            ctx.gradient_sum.add_scaled(dweight, dloss)
            dweight = None
        elif dweight is not None:
            dweight = torch.ops.megatron_tn.head_scaled(dweight, dloss, None, ctx.dtype)
        return dhidden, dweight, *(7 * [None])


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_start: int, chunk: int | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or 0 in (len(hidden), len(weight)):
        raise ValueError(
            f"hidden.shape={tuple(hidden.shape)} and weight.shape={tuple(weight.shape)} must be [T, D] and [V, D], "
            "with T and V at least 1"
        )
    if hidden.dtype != weight.dtype or not torch.is_floating_point(hidden):
        raise ValueError(f"hidden.dtype={hidden.dtype} and weight.dtype={weight.dtype} must be one floating type")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype}; it must be [T] = ({hidden.shape[0]},) int64"
        )
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start} must be >= 0")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk_tokens={chunk} must be >= 1")
