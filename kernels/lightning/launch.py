"""The launches of lightning attention's Triton kernels: which tensors, tiles, descriptors and segments each gets."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.lightning.configs import THETA_STRETCH, Tile, padded, plan_segment, tile_for
from kernels.lightning.triton_scan import scan_kernel
from kernels.lightning.triton_segments import combine_kernel, piece_states_kernel

HOPPER = 9  # the first architecture with bulk tensor copies


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o in v's type, contiguous; the final state in fp32, empty unless it is wanted; the states that segments start
    from, which the backward pass takes again, empty where there are none. Shapes as in `lightning_attention`."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sequences = Sequences.of(q, v, cu_seqlens)
    scan = Scan(q, k, v, decay, sequences)
    state = scan.new_state(return_state)
    first = _given(initial_state)
    starts = scan.segment_starts(first) if sequences.cut else None
    scan.run(o, first, starts, last=state if return_state else None)
    return o, state, scan.new_state(False) if starts is None else starts


def backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of the initial state (fp32; empty where there is none).

    dstate None means zero. starts: the forward pass's, None or empty to find them again.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sequences = Sequences.of(q, v, cu_seqlens)
    query_gradient(dq, do, k, v, decay, initial_state, starts, sequences)
    dinitial, _ = key_value_gradients(dk, dv, do, q, k, v, dstate, decay, sequences, initial_state is not None)
    return dq, dk, dv, dinitial


class Crossing(NamedTuple):
    """What theta's gradient needs of states between the two halves of a backward pass (CROSSING in triton_scan.py)."""

    between: Tensor
    flow: Tensor


def query_gradient(
    dq: Tensor,
    do: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    sequences: "Sequences",
    crossing: bool = False,
) -> Crossing | None:
    """The half of the backward pass that no gradient of a final state enters. Arguments as in `backward`.

    crossing: whether q and k are features of width 2 d and theta's gradient is wanted.
    """
    scan = Scan(do, v, k, decay, sequences, transposed=True)
    first = _given(initial_state)
    if not sequences.cut:
        starts = None
    elif starts is None or not starts.numel():
        starts = scan.segment_starts(first)
    kept = None
    if crossing:
        flow = torch.empty(sequences.pieces, *scan.state_shape[:2], dtype=torch.float32, device=do.device)
        kept = Crossing(scan.new_crossing(), flow)
    scan.run(dq, first, starts, crossing=kept and kept.between)
    return kept


def key_value_gradients(
    dk: Tensor,
    dv: Tensor,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dstate: Tensor | None,
    decay: Tensor,
    sequences: "Sequences",
    initial_wanted: bool,
    crossing: Crossing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The other half: the gradient of the initial state too, and the far part of theta's, [H, d] in fp64."""
    for_dv = Scan(k, q, do, decay, sequences, reverse=True)
    dinitial = for_dv.new_state(initial_wanted)
    last = _given(dstate)
    starts = for_dv.segment_starts(last) if sequences.cut else None
    for_dv.run(dv, last, starts, last=dinitial if initial_wanted else None)
    for_dk = Scan(v, do, q, decay, sequences, transposed=True, reverse=True)
    if crossing is None:
        for_dk.run(dk, last, starts)
        return dinitial, None
    for_dk.run(dk, last, starts, crossing=crossing.between, flow=crossing.flow)
    cos, sin = crossing.flow.sum(0, dtype=torch.float64).chunk(2, dim=-1)
    return dinitial, (cos + sin) * THETA_STRETCH


def state(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    """The final state alone, fp32; shapes as in `lightning_state`. reverse: of q and do as k and v, the gradient of the
    initial state, initial_state being the final one's."""
    sequences = Sequences.of(k, v, cu_seqlens, states_alone=True)
    scan = Scan(k, k, v, decay, sequences, reverse=reverse)
    last = scan.new_state(True)
    scan.segment_starts(_given(initial_state), last)
    return last


@dataclass(frozen=True)
class Sequences:
    """The rows or packed documents of a call, and how they are cut into pieces, the same for all its scans."""

    count: int
    total: int
    segment: int
    segments: int  # of a row; of packed documents, as if they were one
    pieces: int
    bounds: Tensor | None
    document: Tensor | None = None
    first: Tensor | None = None

    @property
    def cut(self) -> bool:
        return self.segments > 1

    @classmethod
    def of(cls, q: Tensor, v: Tensor, bounds: Tensor | None, states_alone: bool = False) -> "Sequences":
        batch, total, heads, width = q.shape
        segment = plan_segment(_capability(q), q.element_size(), batch, total, heads, width, v.shape[-1])
        segments = triton.cdiv(total, segment)
        if bounds is None:
            return cls(batch, total, segment, segments, batch * segments, None)
        bounds = bounds.contiguous()  # kernels step from one to the next
        count = bounds.shape[0] - 1
        if segments == 1 and not states_alone:
            return cls(count, total, total, 1, count, bounds)
        # Reading nothing of the device: as many pieces as any documents of this total and number could have.
        pieces = total // segment + count
        parts = ((bounds.diff() + (segment - 1)) // segment).clamp_(min=1)
        first = torch.nn.functional.pad(parts.cumsum(0, dtype=torch.int32), (1, 0))
        index = torch.arange(pieces, dtype=torch.int32, device=bounds.device)
        document = torch.searchsorted(first[1:], index, right=True, out_int32=True)
        return cls(count, total, segment, max(segments, 2), pieces, bounds, document, first)


class Scan:
    """scan(a, b, c) with its tile chosen. transposed: states are [K, V] and the kernel sums over V, not over K."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        decay: Tensor,
        sequences: Sequences,
        *,
        transposed: bool = False,
        reverse: bool = False,
    ):
        self.heads, self.device = a.shape[2], a.device
        self.sizes = summed, width = (a.shape[3], c.shape[3])
        self.decay, self.sequences, self.reverse = decay.to(torch.float32).contiguous(), sequences, reverse
        self.state_shape = (self.heads, width, summed) if transposed else (self.heads, summed, width)
        self.state_strides = (1, summed) if transposed else (width, 1)

        capability = _capability(a)
        self.summed = padded(summed)
        self.tile = tile_for(capability, a.element_size(), self.summed, padded(width))
        self.slices = triton.cdiv(width, self.tile.out)
        self.descriptors = a.dtype.itemsize == 2 and capability >= HOPPER and all(map(_describable, (a, b, c)))
        if not self.descriptors:
            a, b, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b, c))
        self.inputs = (a, b, c)
        self.ragged = sequences.bounds is not None or sequences.total % self.tile.chunk != 0

    def new_state(self, wanted: bool) -> Tensor:
        shape = (self.sequences.count, *self.state_shape) if wanted else (0,)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def new_crossing(self) -> Tensor:
        """Room for the states between stretches (see CROSSING in triton_scan.py)."""
        sequences = self.sequences
        if sequences.bounds is None:
            stretches = sequences.count * triton.cdiv(sequences.total, THETA_STRETCH)
        else:
            stretches = sequences.total // THETA_STRETCH + sequences.count
        # In half precision bf16: a state may be beyond fp16.
        dtype = torch.float32 if self.inputs[0].dtype == torch.float32 else torch.bfloat16
        return torch.empty(stretches + 1, *self.state_shape, dtype=dtype, device=self.device)

    def run(
        self,
        out: Tensor,
        given: Tensor | None,
        starts: Tensor | None,
        *,
        last: Tensor | None = None,
        crossing: Tensor | None = None,
        flow: Tensor | None = None,
    ) -> None:
        """Write the scan to `out` [B, T, H, C] and the final state to `last`.

        given: the states that sequences start from, None for nothing. starts: `segment_starts` of it, where there are.
        crossing: the states between stretches, written forward and read in reverse, where they and the own ones make
        `flow` [pieces, H, C].
        """
        a, b, c = self.inputs
        sequences = self.sequences
        descriptors = self.descriptors and _describable(out)
        packed = sequences.bounds is not None
        first = given if starts is None else starts
        fades = first if self.reverse else last  # a state that the missing rows of a chunk would make fade
        with torch.cuda.device_of(a):  # Triton launches on the current device
            scan_kernel[(sequences.pieces * self.heads * self.slices,)](
                self._argument(a, self.summed, descriptors),
                self._argument(b, self.summed, descriptors),
                self._argument(c, self.tile.out, descriptors),
                self._argument(out, self.tile.out, descriptors),
                out,
                self.decay,
                first,
                last,
                sequences.bounds,
                sequences.document,
                sequences.first,
                crossing,
                flow,
                sequences.total,
                self.heads,
                sequences.segments,
                sequences.segment,
                sequences.count,
                self.slices,
                *self.sizes,
                *a.stride()[:3],
                *b.stride()[:3],
                *c.stride()[:3],
                *out.stride()[:3],
                *self.state_strides,
                REVERSE=self.reverse,
                RAGGED=packed or (self.ragged and fades is not None),
                PACKED=packed,
                CUT=sequences.cut,
                HAS_FIRST=first is not None,
                FROM_ZERO=given is None,
                HAS_LAST=last is not None,
                CROSSING=0 if crossing is None else THETA_STRETCH,
                DESCRIPTORS=descriptors,
                **self._constants(),
            )

    def segment_starts(self, given: Tensor | None, last: Tensor | None = None) -> Tensor:
        """The state every piece starts from, [pieces, H, ...] as the states are; the final states go to `last`.

        given: the states that sequences start from; without it the first pieces' are left as they were allocated.
        """
        _, b, c = self.inputs
        sequences = self.sequences
        packed = sequences.bounds is not None
        states = torch.empty(sequences.pieces, *self.state_shape, dtype=torch.float32, device=self.device)
        with torch.cuda.device_of(b):
            piece_states_kernel[(sequences.pieces * self.heads * self.slices,)](
                self._argument(b, self.summed, self.descriptors),
                self._argument(c, self.tile.out, self.descriptors),
                states,
                self.decay,
                sequences.bounds,
                sequences.document,
                sequences.first,
                sequences.total,
                self.heads,
                sequences.segments,
                sequences.segment,
                sequences.count,
                self.slices,
                *self.sizes,
                *b.stride()[:3],
                *c.stride()[:3],
                *self.state_strides,
                REVERSE=self.reverse,
                RAGGED=self.ragged,
                PACKED=packed,
                CUT=sequences.cut,
                WITH_LAST=last is not None,
                DESCRIPTORS=self.descriptors,
                **self._constants(),
            )
            size, block = self.sizes[0] * self.sizes[1], 1024
            combine_kernel[(sequences.count * self.heads, triton.cdiv(size, block))](
                states,
                given,
                last,
                self.decay,
                sequences.bounds,
                sequences.first,
                sequences.total,
                self.heads,
                sequences.segments,
                sequences.segment,
                size,
                REVERSE=self.reverse,
                PACKED=packed,
                BLOCK=block,
            )
        return states

    def _constants(self) -> dict:
        return {
            "CHUNK": self.tile.chunk,
            "SUMMED": self.summed,
            "OUT": self.tile.out,
            "STAGES": self.tile.stages,
            "num_warps": self.tile.warps,
        }

    def _argument(self, x: Tensor, columns: int, described: bool) -> Tensor | TensorDescriptor:
        return _descriptor(x, self.tile, columns) if described else x


def _capability(x: Tensor) -> int:
    return _capability_of(x.device) if x.is_cuda else HOPPER


@functools.cache
def _capability_of(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _given(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


def _describable(x: Tensor) -> bool:
    """Whether bulk copies can read and write x: 16-byte aligned rows, each element of its own."""
    return x.data_ptr() % 16 == 0 and _describable_layout(x.shape, x.stride(), x.element_size())


# A launch's preparation costs the host as much as the launch: what depends on shapes alone is done once.
@functools.lru_cache(maxsize=4096)
def _describable_layout(shape: torch.Size, strides: tuple[int, ...], element_bytes: int) -> bool:
    step = 16 // element_bytes
    aligned = all(s > 0 and s % step == 0 for s, n in zip(strides[:3], shape[:3], strict=True) if n > 1)
    # Copies are of whole 16 bytes, so a width that is not would reach into the next head.
    return aligned and strides[3] == 1 and shape[3] % step == 0


_templates: dict[tuple, dict] = {}  # the fields of a descriptor but for its tensor


def _descriptor(x: Tensor, tile: Tile, columns: int) -> TensorDescriptor:
    """x [B, T, H, width] in tiles of one row and head, `tile.chunk` positions and `columns` of the width."""
    key = (x.shape, x.stride(), x.dtype, tile.chunk, columns)
    fields = _templates.get(key)
    if fields is None:
        if len(_templates) >= 4096:
            _templates.clear()
        # The stride of a dimension of one is never used, but must look like one.
        strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
        descriptor = TensorDescriptor(x, list(x.shape), [*strides, 1], [1, tile.chunk, 1, columns])
        _templates[key] = {name: value for name, value in vars(descriptor).items() if name != "base"}
        return descriptor
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=x)
    return descriptor
