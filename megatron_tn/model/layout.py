"""The layout of a forward pass's tokens: positions, document bounds, this rank's slices, decoding state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gla.step_buffer import StepBuffer
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.state_passing import SequenceSlice


@dataclass(frozen=True)
class TokenLayout:
    """Passed from the model to its blocks and their token mixers; only `state` differs between blocks.

    positions: int64 [N], each token's position in its document, or [B, N] where rows begin at positions of their own;
        under context parallelism this rank's [n].
    cu_seqlens: int32 [documents + 1], document bounds in a packed sequence (B = 1), relative to this rank's first
        token; None if each row is one document.
    sequence_slice: this rank's n of the N tokens of each row (context parallelism); None if n = N.
    token_slices: the split of the B x n tokens over tensor-parallel ranks outside split layers (sequence parallelism);
        None if every rank has all of them.
    state: a block's recurrent state after the preceding tokens, B its first dimension; None at a document's beginning.
        A StepBuffer for buffered decoding steps, with update_state.
    return_state: whether blocks return their state after the last token.
    update_state: whether blocks write their state after the token (N = 1, without gradients) over `state`.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    sequence_slice: SequenceSlice | None = None
    token_slices: TokenSlices | None = None
    state: Tensor | StepBuffer | None = None
    return_state: bool = False
    update_state: bool = False

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        start: int | Tensor = 0,
        return_state: bool = False,
        update_state: bool = False,
        context: ParallelContext | None = None,
    ) -> TokenLayout:
        """The layout of tokens [B, N], the same on every rank.

        start: position of the first token, or of each row's first, int64 [B]. context: ranks whose context and sequence
            parallelism split the tokens; None: every rank has all tokens.

        Raises:
            ValueError: fewer tokens in a row than context-parallel ranks.
        """
        batch, length = tokens.shape
        if isinstance(start, Tensor) and length == 1:
            positions = start[:, None]
        else:
            positions = document_positions(length, cu_seqlens, tokens.device)
            positions = positions + (start[:, None] if isinstance(start, Tensor) else start)
        sequence_slice = token_slices = None
        if context is not None and context.cp.size > 1:
            sequence_slice = SequenceSlice(context.cp, length, cu_seqlens, tokens.device)
            positions, cu_seqlens = sequence_slice.take(positions), sequence_slice.cu_seqlens
            length = sequence_slice.length
        if context is not None and context.sequence_parallel:
            token_slices = TokenSlices(context.tp, batch, length)
        return cls(
            positions,
            cu_seqlens,
            sequence_slice,
            token_slices,
            return_state=return_state,
            update_state=update_state,
        )

    def take(self, x: Tensor) -> Tensor:
        """x [B, N] -> this context-parallel rank's [B, n]."""
        return x if self.sequence_slice is None else self.sequence_slice.take(x)

    def continuing(self, state: Tensor | StepBuffer | None) -> TokenLayout:
        """This layout with `state` as the block's initial state; None leaves the layout unchanged."""
        return self if state is None else dataclasses.replace(self, state=state)


def document_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its document, int64 [length]. cu_seqlens [documents + 1]: the documents' bounds."""
    positions = torch.arange(length, device=device)
    if cu_seqlens is None:
        return positions
    document = torch.searchsorted(cu_seqlens.long(), positions, right=True) - 1
    return positions - cu_seqlens.long()[document]
