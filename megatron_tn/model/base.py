"""The language-model interface of every architecture, for engines, checkpoints, evaluation and decoding."""

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
    """Recurrent state after the tokens processed so far (the counterpart of a KV cache).

    layers: one tensor per block, B its first dimension. Linear attention: fp32 [B, H / tp, K, d], K = 2d if the block
        uses LRPE, else d; the size does not depend on the number of tokens. Softmax attention: keys and values.
    position: number of tokens processed; int64 [B] where rows differ.
    """

    layers: list[Tensor]
    position: int | Tensor

    def first_rows(self, count: int) -> DecodingState:
        """The state of the first `count` of the B rows."""
        position = self.position[:count] if isinstance(self.position, Tensor) else self.position
        return DecodingState([layer[:count] for layer in self.layers], position)


class ModelOutput(NamedTuple):
    """Without targets: logits [B, N, V]. With targets: loss and token_losses [B, N]. With return_state: state."""

    logits: Tensor | None = None
    loss: Tensor | None = None
    token_losses: Tensor | None = None
    state: DecodingState | None = None


class Body(Protocol):
    """The part of an architecture before the output head: embedding, blocks, final norm.

    layers: the blocks in order. Each is called as block(x, layout, ...) -> (x, state). x is the first argument and the
        only one that needs a gradient, so that engines can attach backward hooks to it. A block is the unit of
        recomputation, of compilation, of FSDP2's sharding and of ZeRO 3's gathering.
    """

    layers: nn.ModuleList

    fixed_state: bool  # whether the state's size does not depend on the number of tokens

    def initial_state(self, rows: int) -> list[Tensor]:
        """Each block's state before the first token, in tensors that `update_state` writes over. An architecture whose
        state grows with the number of tokens need not have it."""
        ...

    def __call__(
        self, tokens: Tensor, layout: TokenLayout, state: DecodingState | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """tokens [B, n] -> (normalised hidden vectors [B, n, D], or this rank's slice [S, D] with layout.token_slices;
        each block's state after these tokens, or None without layout.return_state)."""
        ...


class Model(nn.Module):
    """A causal language model. context: this process's ranks, which determine its part of the parameters.

    body and lm_head become the attributes `model` and `lm_head`: parameters are named as in the released weights.
    """

    def __init__(self, config: ModelConfig, context: ParallelContext, body: Body, lm_head: VocabParallelHead):
        super().__init__()
        self.config = config
        self.context = context
        self.model = body
        self.lm_head = lm_head

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, see `Body.layers`."""
        return self.model.layers

    @property
    def splits_tokens(self) -> bool:
        """Whether context- or sequence-parallel ranks split the tokens of a forward pass with targets and without
        states."""
        return self.context.cp.size > 1 or self.context.sequence_parallel

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        state: DecodingState | None = None,
        return_state: bool = False,
        update_state: bool = False,
    ) -> ModelOutput:
        """tokens [B, N] int64 -> logits [B, N, V], or the next-token loss.

        targets [B, N]: the id that should follow each token, -100 to ignore. The loss is in nats, fp32; the logits
        [B, N, V] are never materialised. reduction: "mean" divides by the number of targets != -100, "sum" does not,
        "none" returns `loss` [B, N] without gradient.
        cu_seqlens [documents + 1] int32: bounds of the documents in a packed sequence (B = 1); tokens see only their
        own document.
        state: the state after the preceding tokens. return_state: return in `out.state` the state after `tokens`.
        update_state: write the state after the one token of each row over the tensors of `state`; without gradients.

        Every context-parallel rank gets the whole sequences. With targets and neither state nor return_state, a rank
        computes its slice of n tokens only: token_losses [B, n], and loss = sum over the slice's targets ("mean":
        divided by the number of all targets != -100), so that losses add up over the group. Sequence parallelism, too,
        is used in this case only: decoding has about one token a row.

        Raises:
            ValueError: an unknown reduction; cu_seqlens with B > 1, or together with a state; more tokens than
                config.max_length (of packed documents checked on a CPU only, and not where each row has a position).
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
        if not isinstance(start, Tensor):  # it would have to be read from the device
            self._check_length(start + tokens.shape[1], cu_seqlens)
        context = self.context if shared else None
        layout = TokenLayout.of(
            tokens, cu_seqlens, start=start, return_state=return_state, update_state=update_state, context=context
        )
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

    def advance(self, tokens: Tensor, state: DecodingState | None) -> DecodingState:
        """The state after tokens [B, N], which follow those of `state`, at the same position in every row. No logits
        are formed.

        Raises:
            ValueError: more tokens than config.max_length.
        """
        start = 0 if state is None else state.position
        self._check_length(start + tokens.shape[1])
        _, states = self.model(tokens, TokenLayout.of(tokens, start=start, return_state=True), state)
        return DecodingState(states, start + tokens.shape[1])

    def _check_length(self, length: int | Tensor, cu_seqlens: Tensor | None = None) -> None:
        """length: tokens of a row; a tensor of each row's is not read, since the decoder has checked requests."""
        if self.config.max_length and not isinstance(length, Tensor):
            if cu_seqlens is not None:
                length = 0 if cu_seqlens.is_cuda else int(cu_seqlens.diff().max())
            if length > self.config.max_length:
                raise ValueError(
                    f"a sequence of {length} tokens is longer than model.max_length={self.config.max_length}"
                )

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss in nats over targets != -100."""
        return self(tokens, targets=targets).loss

    def shard_specs(self) -> dict[str, ShardSpec]:
        """Released name of every parameter -> its split over tensor parallelism."""
        return {name: parameter.shard_spec for name, parameter in self.named_parameters()}

    def named_logical_gradients(self) -> dict[str, Tensor]:
        """After backward: released name -> gradient of the logical (unsplit) parameter. Collective over tp.

        The gradients are not reduced over data-parallel ranks; engines do that.
        """
        return {
            name: parameter.shard_spec.gather(parameter.grad, self.context.tp)
            for name, parameter in self.named_parameters()
            if parameter.grad is not None
        }


def has_fixed_state(model: Model) -> bool:
    """Whether the size of the model's state does not depend on the number of tokens (`Body.fixed_state`)."""
    return getattr(model.model, "fixed_state", False)
