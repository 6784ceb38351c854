"""What a forward pass knows of its tokens beside their ids: positions, documents, this rank's share, decoding state."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.sequence import TokenSlices
from megatron_tn.parallel.state_passing import SequenceSlice


@dataclass(frozen=True)
class TokenLayout:
    """Passed unchanged from the model to its blocks and their mixers; `state` alone differs from block to block.

    positions: int64 [N], each token's position in its document; [n] under context parallelism, this rank's.
    cu_seqlens: int32 [documents + 1], the documents' bounds in a packed sequence (B is 1), counted from the first of
        this rank's tokens; None where each row is one document.
    sequence_slice: this rank's n of the N tokens of each row (context parallelism); None where it has all.
    token_slices: how tensor-parallel ranks share B x n tokens out between split layers (sequence parallelism); None
        where each has all.
    state: what a block keeps of the tokens before these, B its first dimension; None at the beginning of a document.
    return_state: whether blocks also return their state after these tokens.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    sequence_slice: SequenceSlice | None = None
    token_slices: TokenSlices | None = None
    state: Tensor | None = None
    return_state: bool = False

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        start: int = 0,
        return_state: bool = False,
        context: ParallelContext | None = None,
    ) -> TokenLayout:
        """The layout of tokens [B, N], the same on every rank.

        start: position of the first token. context: the ranks that share the tokens out by its context and sequence
        parallelism; None gives each rank all tokens.

        Raises:
            ValueError: fewer tokens in a row than context-parallel ranks.
        """
        batch, length = tokens.shape
        positions = document_positions(length, cu_seqlens, tokens.device) + start
        sequence_slice = token_slices = None
        if context is not None and context.cp.size > 1:
            sequence_slice = SequenceSlice(context.cp, length, cu_seqlens, tokens.device)
            positions, cu_seqlens = sequence_slice.take(positions), sequence_slice.cu_seqlens
            length = sequence_slice.length
        if context is not None and context.sequence_parallel:
            token_slices = TokenSlices(context.tp, batch, length)
        return cls(positions, cu_seqlens, sequence_slice, token_slices, return_state=return_state)

    def take(self, x: Tensor) -> Tensor:
        """x [B, N] -> this context-parallel rank's [B, n]."""
        return x if self.sequence_slice is None else self.sequence_slice.take(x)

    def continuing(self, state: Tensor | None) -> TokenLayout:
        """The same tokens after those that led to a block's `state`."""
        return self if state is None else dataclasses.replace(self, state=state)


def document_positions(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its document, int64 [length]. cu_seqlens [documents + 1]: the documents' bounds."""
    positions = torch.arange(length, device=device)
    if cu_seqlens is None:
        return positions
    document = torch.searchsorted(cu_seqlens.long(), positions, right=True) - 1
    return positions - cu_seqlens.long()[document]
