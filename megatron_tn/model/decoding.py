"""The forward pass of TransNormerLLM's decoding step in fused operators: five kernels a layer."""

from torch import Tensor

from kernels import token_glu, token_linear
from kernels.gla.step import gla_step_
from megatron_tn.model.attention import GatedLinearAttention
from megatron_tn.model.base import Model
from megatron_tn.model.block import Block
from megatron_tn.model.norm import SimpleRMSNorm
from megatron_tn.model.sglu import SGLU
from megatron_tn.parallel.linear import SplitLinear


def serves(model: Model, rows: int) -> bool:
    """Whether `token_logits` computes this model's function: one row, with SimpleRMSNorm, on one rank."""
    body = model.model
    return (
        rows == 1
        and model.context.tp.size == 1
        and not body.absolute_positions
        and type(body.final_norm) is SimpleRMSNorm
        and all(
            type(block) is Block
            and type(block.token_norm) is type(block.channel_norm) is SimpleRMSNorm
            and type(block.token_mixer) is GatedLinearAttention
            and block.token_mixer.norm is None
            and type(block.channel_mixer) is SGLU
            for block in body.layers
        )
    )


def token_logits(model: Model, tokens: Tensor, positions: Tensor, states: list[Tensor]) -> Tensor:
    """tokens, positions int64 [1] -> logits [1, V]; the states, B = 1, become those after the token.

        q, k, v, u = W_qkvu norm(x)             y = (step of GLA) * u       x = x + W_o y / rms(o)
        h = act(W_1 norm(x)) * W_2 norm(x)      x = x + W_3 h

    Each kernel reads one weight or the state once. Norms scale the products' results, in fp32; the model's own forward
    pass rounds the normed vector first.
    """
    body = model.model
    eps = model.config.norm_eps
    x = body.embed_tokens(tokens)[0]
    decay = body.decay(x.device)
    for layer, block in enumerate(body.layers):
        mixer, glu = block.token_mixer, block.channel_mixer
        qkvu = token_linear(x, **_weight(mixer.qkvu_proj), eps=eps)
        theta = None if mixer.lrpe is None else mixer.lrpe()
        y, squares = gla_step_(qkvu[None, None], states[layer], decay[layer], theta, mixer.act, mixer.gate, positions)
        x = token_linear(y[0, 0], **_weight(mixer.out_proj), eps=eps, square_sum=squares[0], residual=x)
        scales = {"gate_scale": glu.l1.weight_scale, "value_scale": glu.l2.weight_scale}
        hidden = token_glu(x, glu.l1.weight, glu.l2.weight, **scales, eps=eps, act=glu.act)
        x = token_linear(hidden, **_weight(glu.l3), residual=x)
    return token_linear(x, model.lm_head.weight, eps=eps)[None, : model.lm_head.vocab_size]


def _weight(layer: SplitLinear) -> dict[str, Tensor | None]:
    """The arguments of `token_linear` that are the layer's."""
    return {"weight": layer.weight, "weight_scale": layer.weight_scale}
