"""A language model as engines, checkpoints, evaluation and decoding see it, whatever its architecture."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from megatron_tn.config import ModelConfig
from megatron_tn.model.layout import TokenLayout
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.embedding import VocabParallelHead
from megatron_tn.parallel.loss import IGNORE
from megatron_tn.parallel.sharding import ShardSpec

REDUCTIONS = ("mean", "sum", "none")


class DecodingState(NamedTuple):
    """Everything that decoding keeps of the tokens so far.

    layers: one tensor a block, B its first dimension. TransNormer's are fp32 [B, H / tp, K, d], K = 2d where the block
        uses LRPE and d elsewhere, of one size for any number of tokens; softmax attention's would hold keys and values.
    position: number of tokens so far.
    """

    layers: list[Tensor]
    position: int

    def first_rows(self, count: int) -> DecodingState:
        """The state of the first `count` of the B rows."""
        return DecodingState([layer[:count] for layer in self.layers], self.position)


class ModelOutput(NamedTuple):
    """logits [B, N, V] without targets; loss and token_losses [B, N] with them; state where return_state is true."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    token_losses: Tensor | None = None
    state: DecodingState | None = None


class Body(Protocol):
    """What an architecture builds between token ids and the output head: embedding, blocks, final norm.

    layers: the blocks in order. Each is called as block(x, layout, ...) -> (x, state): x first and alone among what
        needs a gradient, so that engines can hook into it. Recomputation wraps a block, compilers compile it, FSDP2
        shards it and ZeRO 3 gathers its weights as one.
    """

    layers: nn.ModuleList

    def __call__(
        self, tokens: Tensor, layout: TokenLayout, state: DecodingState | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """tokens [B, n] -> normed hidden vectors [B, n, D], or this rank's slice [S, D] where layout has token_slices;
        and each block's state after these tokens, None where layout.return_state is false."""
        ...


class Model(nn.Module):
    """A causal language model. `context` says which part of it this process holds.

    body, lm_head: under their names in released weights, so that a parameter's name is its name on disk.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, body: Body, lm_head: VocabParallelHead):
        super().__init__()
        self.config = config
        self.context = context
        self.model = body
        self.lm_head = lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The body's layers; see `Body.layers` for what may be done with them."""
        return self.model.layers

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        state: DecodingState | None = None,
        return_state: bool = False,
    ) -> ModelOutput:
        """tokens [B, N] int64 -> logits [B, N, V], or the next-token loss.

        targets [B, N]: the id that should follow each token, -100 to ignore. The loss is in nats, fp32, and the full
        logits are never formed. reduction "mean" divides by the number of targets != -100, "sum" does not, and "none"
        gives `loss` as [B, N], outside autograd.
        cu_seqlens [documents + 1] int32: bounds of the documents in a packed sequence (B is 1), which do not see each
        other.
        state: of the tokens before these; with return_state, `out.state` is that after them.

        Every context-parallel rank is given the whole sequences. With targets, and neither state nor return_state, it
        computes its slice of n tokens: its loss is the sum over its own targets (for "mean" divided by the number of
        all), so that the losses of the group add up; token_losses are [B, n]. Sequence parallelism likewise shares
        tokens out in that case alone: decoding has about one token a row.

        Raises:
            ValueError: an unknown reduction; cu_seqlens with B > 1, or together with a state.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
        if cu_seqlens is not None and tokens.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs tokens of shape [1, N], got {list(tokens.shape)}")
        if cu_seqlens is not None and (state is not None or return_state):
            raise ValueError(
                "cu_seqlens cannot be combined with state or return_state: a state belongs to one document"
            )
        shared = targets is not None and state is None and not return_state
        start = 0 if state is None else state.position
        context = self.context if shared else None
        layout = TokenLayout.of(tokens, cu_seqlens, start=start, return_state=return_state, context=context)
        hidden, states = self.model(layout.take(tokens), layout, state)
        state = DecodingState(states, start + tokens.shape[1]) if return_state else None
        if targets is None:
            return ModelOutput(logits=self.lm_head(hidden), state=state)
        loss, token_losses = self.lm_head(hidden, layout.take(targets), layout.token_slices)
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
        """After backward: released name -> whole gradient, at any tensor-parallel size. Collective over tp.

        These are this data-parallel rank's gradients; an engine sums them over the ranks.
        """
        return {
            name: parameter.shard_spec.gather(parameter.grad, self.context.tp)
            for name, parameter in self.named_parameters()
            if parameter.grad is not None
        }
