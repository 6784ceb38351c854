"""Cross-entropy over a vocabulary that is split by rows over tensor parallel; no rank forms the full logits."""

from torch import Tensor

from kernels import linear_cross_entropy
from megatron_tn.parallel.context import Axis
from megatron_tn.precision.gradient_sum import gradient_sum

IGNORE = -100  # target of a position without a loss


def vocab_parallel_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, axis: Axis, vocab_start: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """hidden [..., D], weight [V_local, D], targets [...] -> sum of losses (fp32 scalar), losses [...] (fp32), in nats.

    vocab_start: id of this rank's first row. dhidden is the gradient of this rank's logits only: hidden must be the
    output of `copy_to` or `TokenSlices.all_gather`, whose backward pass sums dhidden over ranks.
    """
    loss_sum, token_losses = linear_cross_entropy(
        hidden.flatten(0, -2),
        weight,
        targets.flatten(),
        ignore_index=IGNORE,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        group=axis.group,
        gradient_sum=gradient_sum(weight),
    )
    return loss_sum, token_losses.view(targets.shape)
