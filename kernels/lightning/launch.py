"""The launches of lightning attention's Triton kernels: which tensors, tiles, descriptors and segments each gets."""

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.lightning.configs import Tile, segment_length, tile_for
from kernels.lightning.triton_scan import scan_kernel
from kernels.lightning.triton_segments import combine_kernel, segment_states_kernel

HOPPER = 9  # the first architecture with bulk tensor copies


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """o in v's type and the final state in fp32, empty unless it is wanted; shapes as in `lightning_attention`."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    state = _new_state(q, v, cu_seqlens, return_state)
    scan = Scan(q, k, v, decay, cu_seqlens, first=initial_state)
    scan.run(o, last=state if return_state else None)
    return o, state


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state (fp32; empty where there is none). dstate None means zero."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dinitial = _new_state(q, v, cu_seqlens, initial_state is not None)
    Scan(do, v, k, decay, cu_seqlens, first=initial_state, transposed=True).run(dq)
    for_dv = Scan(k, q, do, decay, cu_seqlens, first=dstate, reverse=True)
    for_dv.run(dv, last=None if initial_state is None else dinitial)
    for_dk = Scan(v, do, q, decay, cu_seqlens, first=dstate, transposed=True, reverse=True, like=for_dv)
    for_dk.run(dk)
    return dq, dk, dv, dinitial


class Scan:
    """scan(a, b, c) with a tile and segments chosen, and the states at the segments' starts known.

    first: the state to start from, [rows, H, K, V], of which the kernel sums over K, or over V when `transposed`.
    like: a scan of the same states the other way round, whose segments are then taken over.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        decay: Tensor,
        cu_seqlens: Tensor | None,
        *,
        first: Tensor | None = None,
        transposed: bool = False,
        reverse: bool = False,
        like: "Scan | None" = None,
    ):
        batch, self.total, self.heads, summed_width = a.shape
        self.rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.sizes = (summed_width, c.shape[-1])
        self.state_strides = (1, summed_width) if transposed else (c.shape[-1], 1)
        self.decay, self.cu_seqlens, self.reverse = decay.to(torch.float32), cu_seqlens, reverse

        capability = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else HOPPER
        self.summed = max(16, triton.next_power_of_2(summed_width))
        self.tile = tile_for(capability, a.element_size(), self.summed, max(16, triton.next_power_of_2(c.shape[-1])))
        self.slices = triton.cdiv(c.shape[-1], self.tile.out)
        described = all(map(_describable, (a, b, c))) and c.shape[-1] * c.element_size() % 16 == 0  # the output's rows
        self.descriptors = capability >= HOPPER and a.element_size() == 2 and described
        if not self.descriptors:
            a, b, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b, c))
        self.inputs = (a, b, c)

        if like is not None:
            self.segment = like.segment
        elif cu_seqlens is None:
            self.segment = segment_length(self.tile, self.rows * self.heads * self.slices, self.total)
        else:
            self.segment = self.total
        self.segments = triton.cdiv(self.total, self.segment)
        if like is not None:
            self.first = like.first
        else:
            self.first = None if first is None else first.to(torch.float32).contiguous()
            if self.segments > 1:
                self.first = self._segment_starts()

    def run(self, out: Tensor, last: Tensor | None = None) -> None:
        """Write the scan to `out` [B, T, H, C], contiguous, and the final state to `last`, laid out as `first`."""
        a, b, c = self.inputs
        packed = self.cu_seqlens is not None
        strides = [x for tensor in (a, b, c, out) for x in tensor.stride()[:3]]
        self._launch(
            scan_kernel,
            self.segments,
            *(self._as_argument(x, n) for x, n in ((a, self.summed), (b, self.summed), (c, self.tile.out))),
            out if packed else self._as_argument(out, self.tile.out),
            self.decay,
            self.first,
            last,
            self.cu_seqlens,
            self.total,
            self.heads,
            self.segments,
            self.segment,
            *self.sizes,
            *strides,
            *self.state_strides,
            RAGGED=packed or self.total % self.tile.chunk != 0,
            PACKED=packed,
            HAS_FIRST=self.first is not None,
            HAS_LAST=last is not None,
        )

    def _segment_starts(self) -> Tensor:
        """The state every segment starts from, in scan order: [B, H, segments, size], `first`'s own layout within."""
        _, b, c = self.inputs
        size = self.sizes[0] * self.sizes[1]
        states = torch.empty(self.rows, self.heads, self.segments, size, dtype=torch.float32, device=b.device)
        if self.first is None:
            states[:, :, 0].zero_()
        else:
            states[:, :, 0].copy_(self.first.view(self.rows, self.heads, size))
        self._launch(
            segment_states_kernel,
            self.segments - 1,
            self._as_argument(b, self.summed),
            self._as_argument(c, self.tile.out),
            states,
            self.decay,
            self.total,
            self.heads,
            self.segments,
            self.segment,
            *self.sizes,
            *b.stride()[:3],
            *c.stride()[:3],
            *self.state_strides,
        )
        block = 1024
        first_segment = self.total - (self.segments - 1) * self.segment if self.reverse else self.segment
        with torch.cuda.device_of(states):
            combine_kernel[(self.rows * self.heads, triton.cdiv(size, block))](
                states, self.decay, self.heads, self.segments, self.segment, first_segment, size, BLOCK=block
            )
        return states

    def _launch(self, kernel: Callable, parts: int, *arguments, **constants) -> None:
        with torch.cuda.device_of(self.inputs[0]):  # Triton launches on the current device
            kernel[(self.rows * self.heads, self.slices, parts)](
                *arguments,
                **constants,
                REVERSE=self.reverse,
                DESCRIPTORS=self.descriptors,
                CHUNK=self.tile.chunk,
                SUMMED=self.summed,
                OUT=self.tile.out,
                STAGES=self.tile.stages,
                num_warps=self.tile.warps,
            )

    def _as_argument(self, x: Tensor, columns: int) -> Tensor | TensorDescriptor:
        return _descriptor(x, self.tile, columns) if self.descriptors else x


def _describable(x: Tensor) -> bool:
    """Whether bulk copies can read x: 16-byte aligned rows, each element of its own."""
    step = 16 // x.element_size()
    aligned = all(s > 0 and s % step == 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1)
    return x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0


def _descriptor(x: Tensor, tile: Tile, columns: int) -> TensorDescriptor:
    """x [B, T, H, width] in tiles of one row and head, `tile.chunk` positions and `columns` of the width."""
    # The stride of a dimension of one is never used, but must look like one.
    strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, tile.chunk, 1, columns])


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, q.shape[2], q.shape[3], v.shape[3]) if wanted else (0,)
    return torch.empty(shape, dtype=torch.float32, device=q.device)
