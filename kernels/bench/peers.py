"""Other libraries' attention, timed for comparison where installed. Only the benchmark imports this file."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST_AUTHORS = 8192  # positions; above, the paper authors' kernel takes minutes to compile
LONGEST_SOFTMAX = 32768  # positions; softmax attention's time grows with their square
LEFT_PRODUCT = 8192  # positions at which the paper compares with ((q k^T) * mask) v


@dataclass(frozen=True)
class Peer:
    """Another library's implementation; `function` takes the case's inputs."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]


def attention_peers(length: int, decay: Tensor, device: torch.device) -> tuple[Peer, ...]:
    """The peers for rows of `length` positions; none on a CPU."""
    if device.type != "cuda":
        return ()
    peers = _flash_linear_attention(decay)
    try:
        from lightning_attn.ops import lightning_attn_func

        def authors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lightning_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), decay).transpose(1, 2)

        if length <= LONGEST_AUTHORS:
            peers.append(Peer("the authors' lightning_attn", authors))
    except ImportError:
        pass
    if length <= LONGEST_SOFTMAX:
        peers.append(Peer("softmax, cuDNN", _cudnn))
    if length == LEFT_PRODUCT:
        peers.append(Peer("left product, PyTorch", lambda q, k, v: _left_product(q, k, v, decay)))
    return tuple(peers)


def packed_peers(cu_seqlens: Tensor, decay: Tensor, device: torch.device) -> tuple[Peer, ...]:
    """The peers for documents packed into one row; none on a CPU."""
    return tuple(_flash_linear_attention(decay, cu_seqlens=cu_seqlens)) if device.type == "cuda" else ()


def _flash_linear_attention(decay: Tensor, **options: Tensor) -> list[Peer]:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return []
    name = "flash-linear-attention"
    return [Peer(name, lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=-decay, **options)[0])]


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    return out.transpose(1, 2)


def _left_product(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """((q k^T) * mask) v with a mask [H, T, T] in memory, in the inputs' type."""
    i = torch.arange(q.shape[1], device=q.device)
    distance = (i[:, None] - i).float()
    mask = torch.exp(-decay[:, None, None] * distance.clamp(min=0)).tril().to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * mask) @ v).transpose(1, 2)
