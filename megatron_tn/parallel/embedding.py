"""Input embedding and output head, which share one weight [V, D], split by rows over tensor parallel."""

import torch
from torch import Tensor, nn

from kernels import scaled_embedding
from megatron_tn.parallel.collectives import copy_to, gather_from, reduce_from
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.loss import vocab_parallel_cross_entropy
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec, mark
from megatron_tn.precision.gradient_sum import gradient_sum
from megatron_tn.precision.matmul import linear


def padded_vocab(vocab_size: int, tp: int) -> int:
    """The true vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tp) * tp


class VocabParallelEmbedding(nn.Module):
    """ids [B, N] int64 in [0, vocab_size) -> scale x E[ids] [B, N, D] on every rank, or its slice [S, D] with `slices`.

    Rows of E beyond vocab_size are padding: zero, never looked up, and left out of the loss and the logits.
    """

    def __init__(self, vocab_size: int, embed_dim: int, axis: Axis, scale: float):
        super().__init__()
        self.axis = axis
        self.scale = scale
        self.vocab_size = vocab_size
        spec = ShardSpec((vocab_size, embed_dim), dim=0, padded=padded_vocab(vocab_size, axis.size))
        self.weight = mark(nn.Parameter(torch.empty(spec.local_shape(axis.rank, axis.size))), spec)
        self.vocab_start = axis.rank * (spec.padded // axis.size)

    def forward(self, ids: Tensor, slices: TokenSlices | None = None) -> Tensor:
        embedded = scaled_embedding(
            ids,
            self.weight,
            self.scale,
            row_start=self.vocab_start,
            vocab_size=self.vocab_size,
            gradient_sum=gradient_sum(self.weight),
        )
        return reduce_from(embedded, self.axis) if slices is None else slices.reduce_scatter(embedded)


class VocabParallelHead(nn.Module):
    """The output head: logits, or the loss without forming the logits. Its weight is the embedding's (tied).

    A module of its own that holds the same parameter: ZeRO 3 gathers a module's parameters when its forward is called.
    """

    def __init__(self, embedding: VocabParallelEmbedding):
        super().__init__()
        self.axis = embedding.axis
        self.vocab_size = embedding.vocab_size
        self.vocab_start = embedding.vocab_start
        self.weight = embedding.weight

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, slices: TokenSlices | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden [..., D], or this rank's slice [S, D] with `slices` -> logits [..., vocab_size] on every rank.

        With targets [...] (ids, -100 to ignore): the sum of the losses in nats, fp32, and each token's loss [...],
        fp32 and outside autograd.
        """
        hidden = copy_to(hidden, self.axis) if slices is None else slices.all_gather(hidden)
        if targets is None:
            logits = gather_from(linear(hidden, [self.weight])[0], self.axis)
            return logits[..., : self.vocab_size]
        return vocab_parallel_cross_entropy(
            hidden, self.weight, targets, axis=self.axis, vocab_start=self.vocab_start, vocab_size=self.vocab_size
        )
