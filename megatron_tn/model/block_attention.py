"""Softmax attention within blocks of model.block_length tokens, DiagAttention of TransNormer (arXiv 2210.10340).

y_t = sum over s <= t, in t's block, of softmax_s(q_t . k_s / sqrt(d)) v_s

Blocks are counted from the beginning of a document, so a block never holds two documents.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.model.softmax_attention import SoftmaxAttention, causal_attention
from megatron_tn.parallel.context import Axis


class BlockAttention(SoftmaxAttention):
    """`SoftmaxAttention` within blocks.

    The state [B, 2, H / tp, t, d] holds the rotated keys and the values of the t < block_length tokens of a block that
    is not full; t = 0 after a full one.
    """

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__(config, axis)
        self.block_length = config.block_length

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        return block_attention(q, k, v, self.block_length, layout.cu_seqlens)

    def kept(self, state: Tensor) -> Tensor:
        return state[:, :, :, state.shape[3] // self.block_length * self.block_length :]

    def kept_tokens(self, tokens: int) -> int:
        return tokens % self.block_length


def block_attention(q: Tensor, k: Tensor, v: Tensor, block: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """q [B, n, H, d], k, v [B, t, H, d] -> y [B, n, H, d]. The queries are those of the last n of t tokens, and the
    first token begins a block.

    cu_seqlens: int32 [documents + 1], document bounds in a packed sequence (B = 1, n = t); documents may be empty.
    """
    n, t = q.shape[1], k.shape[1]
    if cu_seqlens is None and t <= block:
        return causal_attention(q, k, v)
    parts = (pad(q, (0, 0, 0, 0, t - n, 0)) if n < t else q, k, v)
    if cu_seqlens is None:
        blocks = -(-t // block)
        filled = [pad(part, (0, 0, 0, 0, 0, -t % block)) if t % block else part for part in parts]
    else:
        rows = rows_in_blocks(t, block, cu_seqlens)
        blocks = t // block + cu_seqlens.shape[0] - 1  # each document may leave a block partly filled
        filled = [part.new_zeros(1, blocks * block, *part.shape[2:]).index_copy(1, rows, part) for part in parts]
    # What is not filled comes after the tokens of its block, which therefore do not see it.
    y = causal_attention(*(part.unflatten(1, (blocks, block)).flatten(0, 1) for part in filled))
    y = y.unflatten(0, (-1, blocks)).flatten(1, 2)
    return y[:, t - n : t] if cu_seqlens is None else y.index_select(1, rows)


def rows_in_blocks(total: int, block: int, cu_seqlens: Tensor) -> Tensor:
    """int64 [total]: the index at which each token is placed when every document is moved to the beginning of a
    block."""
    bounds = cu_seqlens.long()
    token = torch.arange(total, device=bounds.device)
    document = torch.searchsorted(bounds, token, right=True) - 1
    blocks = (bounds.diff() + block - 1) // block
    return (blocks.cumsum(0) - blocks)[document] * block + token - bounds[document]
