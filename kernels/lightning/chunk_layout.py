"""How the plain PyTorch form cuts sequences into chunks; all padding and document boundaries are handled here.

Every document starts a new chunk, so that no product sees two documents and no mask is needed. A document's last chunk
is padded with zeros, which add nothing to any sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Chunks of `size` positions, and the slots of states: a document of n chunks has n + 1 slots, one before each
    chunk and one after the last.

    total: positions of a row.
    lengths: [chunks], positions of each chunk without its padding.
    before: slot of the state before every chunk; the state after the chunk is in the next slot.
    first, last: for every document the slots of its initial and final state (the same slot if it is empty).
    source: [chunks * size], the row position of each position of the chunks, -1 for padding; None where every row is
        one document, whose chunks are slices.
    place: [T], the inverse of source; None where source is None.
    """

    size: int
    total: int
    lengths: Tensor
    before: list[int]
    first: list[int]
    last: list[int]
    source: Tensor | None = None
    place: Tensor | None = None

    @property
    def chunks(self) -> int:
        return len(self.before)

    @property
    def slots(self) -> int:
        return len(self.before) + len(self.first)

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, W] with any strides -> contiguous [chunks, B, H, size, W] in `dtype`."""
        batch, total, heads, width = x.shape
        if self.source is not None:
            gathered = x[0].index_select(0, self.source.clamp(min=0)).to(dtype)
            gathered.masked_fill_((self.source < 0)[:, None, None], 0)
            return gathered.view(self.chunks, 1, self.size, heads, width).transpose(2, 3).contiguous()
        out = torch.empty(self.chunks, batch, heads, self.size, width, dtype=dtype, device=x.device)
        full, rest = divmod(total, self.size)
        body = x[:, : full * self.size].unflatten(1, (full, self.size))
        out[:full].copy_(body.permute(1, 0, 3, 2, 4))
        if rest:
            out[full, :, :, :rest].copy_(x[:, full * self.size :].transpose(1, 2))
            out[full, :, :, rest:].zero_()
        return out

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `split`: [chunks, B, H, size, W] -> contiguous [B, T, H, W] in `dtype`."""
        _, batch, heads, _, width = x.shape
        if self.place is not None:
            flat = x.transpose(2, 3).reshape(self.chunks * self.size, heads, width)
            return flat.index_select(0, self.place).to(dtype)[None]
        out = torch.empty(batch, self.total, heads, width, dtype=dtype, device=x.device)
        full, rest = divmod(self.total, self.size)
        out[:, : full * self.size].unflatten(1, (full, self.size)).copy_(x[:full].permute(1, 0, 3, 2, 4))
        if rest:
            out[:, full * self.size :].copy_(x[full, :, :, :rest].transpose(1, 2))
        return out


def whole_rows(total: int, size: int, device: torch.device) -> ChunkLayout:
    """The layout of rows that are one document of `total` positions each."""
    chunks = -(-total // size)
    lengths = torch.full((chunks,), size, device=device)
    lengths[-1] = total - (chunks - 1) * size
    return ChunkLayout(size, total, lengths, before=list(range(chunks)), first=[0], last=[chunks])


def packed_documents(cu_seqlens: Tensor, total: int, size: int) -> ChunkLayout:
    """The layout of documents packed into one row (cu_seqlens as in `lightning_attention`), empty ones included.

    Copies cu_seqlens to the host: a synchronisation with the GPU.
    """
    device = cu_seqlens.device
    bounds = cu_seqlens.to("cpu", torch.int64)
    starts, counts = bounds[:-1], bounds.diff()
    chunk_counts = (counts + size - 1) // size
    document = torch.repeat_interleave(torch.arange(len(counts)), chunk_counts)
    chunk_ends = chunk_counts.cumsum(0)
    offset = (torch.arange(len(document)) - (chunk_ends - chunk_counts)[document]) * size  # in its document
    lengths = (counts[document] - offset).clamp(max=size)

    within = torch.arange(size)
    source = (starts[document] + offset)[:, None] + within
    held = within < lengths[:, None]
    place = torch.arange(len(document) * size).view(-1, size)[held]
    last = chunk_ends + torch.arange(len(counts))
    return ChunkLayout(
        size,
        total,
        lengths.to(device),
        before=(torch.arange(len(document)) + document).tolist(),
        first=(last - chunk_counts).tolist(),
        last=last.tolist(),
        source=torch.where(held, source, -1).flatten().to(device),
        place=place.to(device),
    )
