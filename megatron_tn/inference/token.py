"""The forward pass of one decoding step: one token of every row, against states that it updates in place.

Whatever `token_logits` does, the decoder captures as a CUDA graph.
"""

from torch import Tensor

from megatron_tn.model.base import DecodingState, Model
from megatron_tn.model.registry import architecture


def token_logits(model: Model, tokens: Tensor, positions: Tensor, states: list[Tensor]) -> Tensor:
    """tokens, positions int64 [B], each row's own -> logits [B, V] on every rank. The states, one tensor a layer
    (`Body.initial_state`), become those after the tokens. No value is read to the host."""
    fused = architecture(model.config).fused_token
    if fused is not None and tokens.is_cuda and fused.serves(model, tokens.shape[0]):
        return fused.logits(model, tokens, positions, states)
    out = model(tokens[:, None], state=DecodingState(states, positions), update_state=True)
    return out.logits[:, 0]
