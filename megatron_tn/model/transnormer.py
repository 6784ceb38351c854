"""TransNormerLLM (arXiv 2307.14995): embedding, blocks of GLA and SGLU, final norm, head tied to the embedding.

    x = E[ids] * sqrt(D)                    the factor is left out where scale_embedding is false
    for each layer: x = x + GLA(norm(x)); x = x + SGLU(norm(x))
    logits = norm(x) E^T

Module names are those of the released weights, so a parameter's name is its name on disk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_tn.config import ConfigError, ModelConfig
from megatron_tn.model.block import Block
from megatron_tn.model.decay import decay_rates
from megatron_tn.model.norm import NORMS
from megatron_tn.parallel.context import Axis, ParallelContext
from megatron_tn.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_tn.parallel.loss import IGNORE
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.sharding import ShardSpec
from megatron_tn.parallel.state_passing import SequenceSlice


class RecurrentState(NamedTuple):
    """All that decoding remembers of the tokens so far; its size does not depend on how many there were.

    layers: one [B, H / tp, K, d] fp32 tensor a layer (K is 2d where the layer uses LRPE).
    position: how many tokens went in.
    """

    layers: list[Tensor]
    position: int


class ModelOutput(NamedTuple):
    """logits [B, N, V] without targets; loss (and the tokens' losses [B, N]) with them; state on request."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    token_losses: Tensor | None = None
    state: RecurrentState | None = None


class TransNormerModel(nn.Module):
    """ids [B, N] -> hidden [B, N, D], normed; or this rank's slice of it, [S, D]."""

    def __init__(self, config: ModelConfig, axis: Axis):
        super().__init__()
        scale = math.sqrt(config.embed_dim) if config.scale_embedding else 1.0
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.embed_dim, axis, scale)
        self.layers = nn.ModuleList(Block(config, layer, axis) for layer in range(config.layers))
        self.final_norm = NORMS[config.norm](config.embed_dim, config.norm_eps)
        # Rates of this rank's heads, layer by layer. Numbers, made a tensor at the first forward pass: engines cast
        # buffers to the parameters' type, and ZeRO 3 every tensor made while a model is built, but rates stay fp32.
        # An argument of the blocks, so that one compiled block serves all layers.
        heads = config.heads // axis.size
        self.rates = [
            decay_rates(config.heads, layer, config.layers, form=config.decay, temperature=config.decay_temperature)[
                axis.rank * heads : (axis.rank + 1) * heads
            ]
            for layer in range(config.layers)
        ]
        self._decay: Tensor | None = None

    def decay(self, device: torch.device) -> Tensor:
        """fp32 [L, H / tp]."""
        if self._decay is None or self._decay.device != device:
            self._decay = torch.tensor(self.rates, dtype=torch.float32, device=device)
        return self._decay

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        state: RecurrentState | None = None,
        return_state: bool = False,
        part: SequenceSlice | None = None,
        slices: TokenSlices | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        start = 0 if state is None else state.position
        positions = document_positions(tokens.shape[1], cu_seqlens, tokens.device) + start
        if part is not None:
            tokens, positions, cu_seqlens = part.take(tokens), part.take(positions), part.cu_seqlens
        x = self.embed_tokens(tokens, slices)
        decay = self.decay(x.device)
        states = []
        for layer, block in enumerate(self.layers):
            before = None if state is None else state.layers[layer]
            x, after = block(x, positions, decay[layer], cu_seqlens, before, return_state, part, slices)
            states.append(after)
        _, x = self.final_norm(x, slices=slices)
        return x, RecurrentState(states, start + tokens.shape[1]) if return_state else None


class TransNormerLM(nn.Module):
    """The language model. One class for every layout: `context` says which part of it this process holds.

    Raises:
        ConfigError: sizes that do not divide, each named with its value and the relation it breaks.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext | None = None):
        super().__init__()
        context = context or ParallelContext()
        if problems := config.problems(context.tp.size):
            raise ConfigError(problems)
        self.config = config
        self.context = context
        self.model = TransNormerModel(config, context.tp)
        self.lm_head = VocabParallelHead(self.model.embed_tokens)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        state: RecurrentState | None = None,
        return_state: bool = False,
    ) -> ModelOutput:
        """tokens [B, N] int64 -> logits [B, N, V], or the next-token loss.

        targets [B, N]: the id that should follow each token, -100 to ignore. The loss is in nats, fp32, and the full
        logits are never formed. reduction "mean" divides by the number of targets != -100, "sum" does not, and "none"
        gives `loss` as [B, N], outside autograd.
        cu_seqlens [n + 1] int32: document boundaries of a packed sequence (B is 1); documents do not see each other.
        state: continue after the tokens that led to it; with return_state, `out.state` continues after these.

        Context-parallel ranks are all given the whole sequences. With targets and no state each works on its slice:
        its loss is then its tokens' share, and the shares of the group add up to the loss; token_losses are the
        slice's. Otherwise each rank does the whole. Likewise sequence parallelism shares tokens out where there are
        targets and no state, and nowhere else: decoding has a token or so a row.

        Raises:
            ValueError: an unknown reduction; cu_seqlens with a batch, or together with a state.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r} is not one of mean, sum, none")
        if cu_seqlens is not None and tokens.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs tokens of shape [1, N], got {list(tokens.shape)}")
        if cu_seqlens is not None and (state is not None or return_state):
            raise ValueError(
                "cu_seqlens cannot be combined with state or return_state: a state belongs to one document"
            )
        part = slices = None
        training = targets is not None and state is None and not return_state
        batch, length = tokens.shape
        if self.context.cp.size > 1 and training:
            part = SequenceSlice(self.context.cp, length, cu_seqlens, tokens.device)
            length = part.length
        if self.context.sequence_parallel and training:
            slices = TokenSlices(self.context.tp, batch, length)
        hidden, state = self.model(tokens, cu_seqlens, state, return_state, part, slices)
        if targets is None:
            return ModelOutput(logits=self.lm_head(hidden), state=state)
        loss, token_losses = self.lm_head(hidden, targets if part is None else part.take(targets), slices)
        if reduction == "mean":
            loss = loss / (targets != IGNORE).sum().clamp(min=1)
        elif reduction == "none":
            loss = token_losses
        return ModelOutput(loss=loss, token_losses=token_losses, state=state)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss in nats over targets != -100."""
        return self(tokens, targets=targets).loss

    def shard_specs(self) -> dict[str, ShardSpec]:
        """Released name of every parameter -> how it is split over tensor parallel."""
        return {name: parameter.shard_spec for name, parameter in self.named_parameters()}

    def named_logical_gradients(self) -> dict[str, Tensor]:
        """After backward: released names -> whole gradients, at any tensor-parallel size. Collective over tp.

        These are this data-parallel rank's gradients; summing them over ranks is the engine's work.
        """
        return {
            name: parameter.shard_spec.gather(parameter.grad, self.context.tp)
            for name, parameter in self.named_parameters()
            if parameter.grad is not None
        }


def empty_model(
    config: ModelConfig, context: ParallelContext | None, device: str | torch.device, dtype: torch.dtype
) -> TransNormerLM:
    """A model whose parameters are allocated on `device` in `dtype`, and hold nothing in particular yet."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return TransNormerLM(config, context)
    finally:
        torch.set_default_dtype(before)


def document_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its document, int64 [length]."""
    positions = torch.arange(length, device=device)
    if cu_seqlens is None:
        return positions
    document = torch.searchsorted(cu_seqlens.long(), positions, right=True) - 1
    return positions - cu_seqlens.long()[document]
