"""Softmax attention, the token mixer of the Transformer and of a hybrid model's softmax layers.

q, k, v = W_q x, W_k x, W_v x
q, k = RoPE(q), RoPE(k)
y_t = sum over s <= t of softmax_s(q_t . k_s / sqrt(d)) v_s     within t's document
out = W_o y

PyTorch's scaled_dot_product_attention computes y in its causal form. Packed documents take FlashAttention's form for
variable lengths in bf16 or fp16 on a GPU, and a mask elsewhere.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import rope
from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.parallel.context import Axis
from megatron_tn.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_parallel, share_input

FLASH_DTYPES = (torch.bfloat16, torch.float16)  # types that FlashAttention's variable-length form takes
FLASH_WIDTHS = range(8, 257, 8)  # d of the same
# Kernels for a cache, which is longer at each call: cuDNN, not among them, makes a plan for each new shape.
FOR_A_CACHE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class SoftmaxAttention(nn.Module):
    """x [B, n, D] -> (output [B, n, D], None, state [B, 2, H / tp, t, d] or None).

    Called as `GatedLinearAttention` is; `decay` is not used, and there is no norm over heads, so no sum(o^2). With
    layout.token_slices, x and output are this rank's slice [S, D] of the tokens.

    The state is the key-value cache: the rotated keys and the values of all t tokens so far, in their type. It is
    returned if layout.return_state, and grows with every token; layout.state is the cache of the preceding tokens.

    W_q, W_k and W_v are three parameters, as in LLaMA's files, and share one all-gather of x and one reduction of dx.
    """

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_base = config.rope_base
        self.q_proj, self.k_proj, self.v_proj = (
            ColumnParallelLinear(config.embed_dim, config.embed_dim, axis, heads=config.heads) for _ in range(3)
        )
        share_input(self.q_proj, self.k_proj, self.v_proj)
        self.out_proj = RowParallelLinear(config.embed_dim, config.embed_dim, axis)

    def forward(
        self, x: Tensor, layout: TokenLayout, decay: Tensor | None = None
    ) -> tuple[Tensor, None, Tensor | None]:
        q, k, v = column_parallel(x, (self.q_proj, self.k_proj, self.v_proj), layout.token_slices)
        q, k = rope(q, k, layout.positions, head_dim=self.head_dim, base=self.rope_base)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        state = None
        if layout.state is not None or layout.return_state:
            state = torch.stack([k, v], dim=1).transpose(2, 3)
            if layout.state is not None:
                state = torch.cat([layout.state, state], dim=3)
            k, v = state.transpose(2, 3).unbind(1)
        y = self.attention(q, k, v, layout)
        return self.out_proj(y.flatten(2), layout.token_slices), None, self.kept(state) if layout.return_state else None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """See `causal_attention`."""
        return causal_attention(q, k, v, layout.cu_seqlens)

    def kept(self, state: Tensor) -> Tensor:
        """The part of the cache that later tokens attend to."""
        return state

    def kept_tokens(self, tokens: int) -> int:
        """How many of the first `tokens` tokens it has."""
        return tokens


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """q [B, n, H, d], k, v [B, t, H, d] of one type -> y [B, n, H, d]. The queries are those of the last n of t tokens.

    cu_seqlens: int32 [documents + 1], document bounds in a packed sequence (B = 1, n = t); documents may be empty.
    """
    n, t = q.shape[1], k.shape[1]
    if cu_seqlens is not None and q.is_cuda and q.dtype in FLASH_DTYPES and q.shape[-1] in FLASH_WIDTHS:
        return _packed_attention(q, k, v, cu_seqlens)
    mask = None
    if cu_seqlens is not None:
        mask = documents_mask(n, cu_seqlens)
    elif 1 < n < t:
        token = torch.arange(t, device=q.device)
        mask = token[t - n :, None] >= token
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    with sdpa_kernel(FOR_A_CACHE) if n < t else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and n == t).transpose(1, 2)


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`causal_attention` of packed documents, without a mask in memory. The operator has a gradient."""
    length = q.shape[1]  # no document is longer; the true maximum would have to be read from the GPU
    bounds = (cu_seqlens, cu_seqlens, length, length)
    found = torch.ops.aten._flash_attention_forward(q[0], k[0], v[0], *bounds, 0.0, True, False)
    return found[0].unsqueeze(0)


def documents_mask(length: int, cu_seqlens: Tensor) -> Tensor:
    """bool [length, length]: whether the row's token sees the column's, which is of its document and not after it."""
    token = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True)
    return (document[:, None] == document) & (token[:, None] >= token)
