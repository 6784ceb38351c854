"""Token mixers by kind, the values of `ModelConfig.mixers`: module, parameters and FLOPs of a layer.

Every module is called as mixer(x, layout, decay) -> (output, sum(o^2) or None, state or None); see attention.py.
"""

from torch import nn

from megatron_tn.config import ModelConfig
from megatron_tn.model.attention import GatedLinearAttention, NormAttention
from megatron_tn.model.block_attention import BlockAttention
from megatron_tn.model.cosine_attention import CosineAttention
from megatron_tn.model.softmax_attention import SoftmaxAttention
from megatron_tn.parallel.context import Axis

MIXERS = {
    "linear": GatedLinearAttention,
    "norm": NormAttention,
    "softmax": lambda config, layer, axis: SoftmaxAttention(config, axis),
    "block": lambda config, layer, axis: BlockAttention(config, axis),
    "cosine": lambda config, layer, axis: CosineAttention(config, axis),
}


def mixers_of(config: ModelConfig, axis: Axis) -> list[nn.Module]:
    """The token mixer of every layer."""
    return [MIXERS[kind](config, layer, axis) for layer, kind in enumerate(config.mixers)]


def projections(kind: str) -> int:
    """D x D matrices of a mixer: q, k, v, W_o, and u of gated linear attention."""
    return 5 if kind == "linear" else 4


def attention_flops(config: ModelConfig, kind: str, lrpe: bool, sequence_length: int) -> int:
    """One token's forward FLOPs in a layer's attention, the mean over a sequence.

    Linear attention counts its recurrence, S += k^T v and q S, a lower bound for every kernel. Softmax attention counts
    both products with all keys, of the sequence or of the block, as PyTorch's counter does.
    """
    d, head_dim = config.embed_dim, config.head_dim
    if kind == "cosine":
        return 4 * config.heads * 2 * head_dim * (head_dim + 1)  # K = 2d, and the column of ones
    if kind in ("linear", "norm"):
        return 4 * d * head_dim * (2 if lrpe else 1)
    return 4 * d * (sequence_length if kind == "softmax" else min(config.block_length, sequence_length))
