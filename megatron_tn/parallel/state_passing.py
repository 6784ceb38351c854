"""Context parallelism of decay attention: ranks exchange states, not keys and values (LASP, arXiv 2404.02882; LASP-2,
arXiv 2502.07563).

Each rank holds a contiguous slice of the sequence. With S_j the final state of slice j computed from a zero initial
state, n_j its length and r the decay rate, slice i starts from

    S_0 exp(-r (n_1 + .. + n_{i-1})) + .. + S_{i-2} exp(-r n_{i-1}) + S_{i-1}

so a layer needs one all-gather of states [B, H, K, d], whatever the sequence length, and its backward pass one
all-gather of the states' gradients. A state S_j of slices before the document at slice i's start has weight zero.
"""

import torch
from torch import Tensor

from kernels import StateExchange, gla_slice
from megatron_tn.parallel.context import Axis


class SequenceSlice:
    """This rank's slice [start, stop) of sequences of `length` tokens. Slices differ in length by at most one token.

    cu_seqlens: document bounds relative to the slice's start, [documents + 1]; documents outside the slice are empty.
        None where each sequence is one document.
    edges: indices of the documents of the slice's first and last token, int64 [2]; None where cu_seqlens is None.

    Raises:
        ValueError: fewer tokens than ranks.
    """

    def __init__(self, axis: Axis, length: int, cu_seqlens: Tensor | None, device: torch.device):
        if length < axis.size:
            raise ValueError(f"a sequence of {length} tokens cannot be cut into parallel.cp={axis.size} slices")
        self.axis = axis
        bounds = [length * rank // axis.size for rank in range(axis.size + 1)]
        self.start, self.stop = bounds[axis.rank], bounds[axis.rank + 1]
        self.lengths = torch.tensor(bounds, device=device).diff()
        self.cu_seqlens = None
        self.edges = None
        # goes_on[i] = 1 if the last document of slice i continues in slice i + 1; fills[i] = 1 if one document fills
        # slice i.
        self.goes_on = torch.ones(axis.size - 1, device=device)
        self.fills = torch.ones(axis.size, device=device)
        if cu_seqlens is not None:
            self.cu_seqlens = (cu_seqlens - self.start).clamp(0, self.stop - self.start)
            edges = torch.tensor(bounds, device=device)
            first = _document_of(edges[:-1], cu_seqlens)
            last = _document_of(edges[1:] - 1, cu_seqlens)
            self.goes_on = (last[:-1] == first[1:]).float()
            self.fills = (first == last).float()
            self.edges = torch.stack([first[axis.rank], last[axis.rank]])

    @property
    def length(self) -> int:
        return self.stop - self.start

    def take(self, x: Tensor) -> Tensor:
        """x [..., N] -> this rank's [..., n]."""
        return x[..., self.start : self.stop]

    def weights(self, decay: Tensor) -> tuple[Tensor, Tensor]:
        """decay [H] -> received and sent, [cp, H] each. For slice j: the weight of S_j in this slice's initial state,
        and the weight of this slice's S in the initial state of slice j."""
        rank, size = self.axis.rank, self.axis.size
        goes_on = torch.cat([self.goes_on, self.goes_on.new_zeros(1)])
        through = (self.fills * goes_on)[:, None] * torch.exp(-decay[None] * self.lengths[:, None])
        one = torch.ones_like(through[:1])
        before = torch.cat([one, through[1:rank].flip(0)]).cumprod(0)[:rank].flip(0) * goes_on[:rank, None]
        after = torch.cat([one, through[rank + 1 : size - 1]]).cumprod(0)[: size - 1 - rank] * goes_on[rank]
        nothing = torch.zeros_like(through)
        return torch.cat([before, nothing[rank:]]), torch.cat([nothing[: rank + 1], after])

    def attend(
        self, qkvu: Tensor, decay: Tensor, theta: Tensor | None, *, act: str, gate: bool, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`kernels.gla` for this slice of the sequence: qkvu [B, n, 4 H d] -> y [B, n, H d], sum of o^2 [B, n].

        positions: int64 [n], the tokens' positions in their documents. Collective over the axis, forward and backward.
        """
        received, sent = self.weights(decay.to(torch.promote_types(qkvu.dtype, torch.float32)))
        exchange = StateExchange(received, sent, self.edges, self.axis.name, self.axis.size)
        return gla_slice(
            qkvu,
            decay,
            theta,
            act=act,
            gate=gate,
            positions=positions,
            cu_seqlens=self.cu_seqlens,
            exchange=exchange,
        )


def _document_of(position: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.searchsorted(cu_seqlens.to(position.dtype), position, right=True) - 1
