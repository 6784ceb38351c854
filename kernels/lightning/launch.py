"""The launches of lightning attention's Triton kernels: which tensors, tiles, descriptors and segments each gets."""

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.lightning.configs import THETA_STRETCH, Tile, padded, plan_segment, tile_for
from kernels.lightning.triton_features import ACTIVATIONS, phases_kernel
from kernels.lightning.triton_scan import scan_kernel
from kernels.lightning.triton_segments import combine_kernel, piece_states_kernel

HOPPER = 9  # the first architecture with bulk tensor copies
PLAIN, SUMMED_SIDE, OUT_SIDE = 0, 1, 2  # which operands of a scan are features, as in triton_scan.py


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    features: "Features | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o in v's type, contiguous; the final state in fp32, empty unless it is wanted; the states that segments start
    from, which the backward pass takes again, empty where there are none. Shapes as in `lightning_attention`."""
    features = features or Features()
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sequences = Sequences.of(q, v, cu_seqlens, features)
    scan = Scan(q, k, v, decay, sequences, features, side=SUMMED_SIDE)
    state = scan.new_state(return_state)
    first = _given(initial_state)
    starts = scan.segment_starts(first) if sequences.cut else None
    scan.run(o, first if starts is None else starts, last=state if return_state else None)
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
    starts: Tensor | None = None,
    features: "Features | None" = None,
    out: tuple[Tensor | None, Tensor, Tensor] | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, of the initial state (fp32; empty where there is none) and of theta (None without).

    dstate None means zero. starts: the forward pass's, None or empty to find them again. out: where to write the first
    three, of any strides; dq may be None, to leave it out, unless theta's gradient is wanted. state: the final state,
    which theta's gradient wants beside dstate.
    """
    features = features or Features()
    dq, dk, dv = out or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sequences = Sequences.of(q, v, cu_seqlens, features)
    first = _given(initial_state)

    flow_q = crossing = None
    if dq is not None:
        for_dq = Scan(do, v, k, decay, sequences, features, side=OUT_SIDE)
        if sequences.cut:
            first = starts if starts is not None and starts.numel() else for_dq.segment_starts(first)
        crossing = for_dq.new_crossing()
        flow_q = for_dq.run(dq, first, raw=q, crossing=crossing)

    for_dv = Scan(k, q, do, decay, sequences, features, side=SUMMED_SIDE, reverse=True)
    dinitial = for_dv.new_state(initial_state is not None)
    last = _given(dstate)
    if sequences.cut:
        last = for_dv.segment_starts(last)
    for_dv.run(dv, last, last=None if initial_state is None else dinitial)
    for_dk = Scan(v, do, q, decay, sequences, features, side=OUT_SIDE, reverse=True)
    flow_k = for_dk.run(dk, last, raw=k, crossing=crossing)
    dtheta = None
    if flow_q is not None:
        dtheta = (flow_q + flow_k).sum(0, dtype=torch.float64)
        # What crosses a sequence's ends is not a difference of two of its positions: it counts from position 0.
        if initial_state is not None:
            dtheta += features.crossing(initial_state, dinitial, features.first_origin(sequences))
        if dstate is not None:
            dtheta -= features.crossing(state, dstate, features.last_origin(sequences))
        dtheta = dtheta[:, None]
    return dq, dk, dv, dinitial, dtheta


def state(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    features: "Features | None" = None,
) -> Tensor:
    """The final state alone, fp32; shapes as in `lightning_state`."""
    features = features or Features()
    sequences = Sequences.of(k, v, cu_seqlens, features, states_alone=True)
    scan = Scan(k, k, v, decay, sequences, features, side=SUMMED_SIDE)
    last = scan.new_state(True)
    scan.segment_starts(_given(initial_state), last)
    return last


@dataclass
class Features:
    """The feature map of q and k, and the tables that LRPE reads (see triton_features.py)."""

    act: str = "none"
    theta: Tensor | None = None  # [H, 1, d]
    positions: Tensor | None = None  # None where only distances matter; otherwise [T] or [B, T]
    flow: bool = False  # whether theta's gradient is wanted
    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    begin: Tensor | None = None

    @property
    def none(self) -> bool:
        return self.act == "none" and self.theta is None

    def of_chunks(self, chunk: int, total: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin within a chunk [H, chunk, 2, d], as precise as `dtype` needs, and of chunks' starts."""
        if chunk not in self.tables:
            within = torch.float32 if dtype == torch.float32 else torch.float16
            self.tables[chunk] = self._table(chunk, 1, within), self._table(triton.cdiv(total, chunk), chunk)
        return self.tables[chunk]

    def of_begins(self, sequences: "Sequences") -> Tensor | None:
        """cos and sin at the first position of every sequence, [H, sequences, 2, d]; None where it does not matter."""
        if self.positions is None:
            return None
        if self.begin is None:
            x = self.positions
            rows, stride = None, 0 if x.dim() == 1 else x.stride(0)
            if sequences.bounds is not None:
                rows, stride = sequences.bounds, x.stride(-1)
            self.begin = self._table(sequences.count, 1, steps=x, rows_of=rows, stride=stride, last=sequences.total - 1)
        return self.begin

    def first_origin(self, sequences: "Sequences") -> Tensor:
        """Where the first stretch of every sequence has its middle, [sequences] fp64."""
        begin = torch.zeros(sequences.count, dtype=torch.float64, device=self.theta.device)
        if self.positions is not None:
            if sequences.bounds is None:
                begin += self.positions[..., 0]
            else:
                begin += self.positions.flatten()[sequences.bounds[:-1].clamp(max=sequences.total - 1).long()]
        return begin + (THETA_STRETCH - 1) / 2

    def last_origin(self, sequences: "Sequences") -> Tensor:
        """The same of its last stretch."""
        length = sequences.total if sequences.bounds is None else sequences.bounds.diff()
        return self.first_origin(sequences) + (length - 1) // THETA_STRETCH * THETA_STRETCH * (length > 0)

    @staticmethod
    def crossing(state: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
        """[H, d] fp64: the sum over sequences of weight times what turning their states would change."""
        (cos, sin), (dcos, dsin) = (x.to(torch.float64).chunk(2, dim=2) for x in (state, gradient))
        return torch.einsum("nhk,n->hk", (dcos * sin - dsin * cos).sum(-1), weight)

    def _table(self, rows, step, dtype=torch.float32, *, steps=None, rows_of=None, stride=0, last=0) -> Tensor:
        """cos and sin of theta times 0, step, 2 step, ..., or of steps[rows_of[0]], steps[rows_of[1]], ..."""
        heads, _, width = self.theta.shape
        table = torch.empty(heads, rows, 2, width, dtype=dtype, device=self.theta.device)
        block = 16
        theta = self.theta.contiguous()
        with torch.cuda.device_of(table):
            phases_kernel[(heads, triton.cdiv(rows, block))](
                theta, steps, rows_of, table, rows, width, step, stride, last, WIDTH=padded(width), BLOCK=block
            )
        return table


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
    def of(
        cls, q: Tensor, v: Tensor, bounds: Tensor | None, features: Features, states_alone: bool = False
    ) -> "Sequences":
        batch, total, heads, width = q.shape
        lrpe = features.theta is not None
        segment = plan_segment(_capability(q), q.element_size(), batch, total, heads, width, v.shape[-1], lrpe)
        segments = triton.cdiv(total, segment)
        if bounds is None:
            return cls(batch, total, segment, segments, batch * segments, None)
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
    """scan(a, b, c) with its tile chosen. side: which operands are features, if there are any."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        decay: Tensor,
        sequences: Sequences,
        features: Features,
        *,
        side: int,
        reverse: bool = False,
    ):
        self.heads = a.shape[2]
        self.sizes = (a.shape[3], c.shape[3])  # the width summed over and c's, before doubling
        self.decay, self.sequences, self.reverse = decay.to(torch.float32), sequences, reverse
        self.features, self.side = features, PLAIN if features.none else side
        doubled = features.theta is not None
        # A state is [K, V]; the width summed over is K where queries and keys are, on the summed side.
        key, value = self.sizes if side == SUMMED_SIDE else self.sizes[::-1]
        strides = (value, 1) if side == SUMMED_SIDE else (1, value)
        self.state_shape = (self.heads, key * (1 + doubled), value)
        self.state_layout = (*strides, key * value, self.state_shape[1] * value)

        self.summed = padded(self.sizes[0])
        self.tile = _tile(a, self.sizes[1], features, side)
        self.slices = triton.cdiv(self.sizes[1], self.tile.out)
        self.descriptors = a.dtype.itemsize == 2 and _capability(a) >= HOPPER and all(map(_describable, (a, b, c)))
        if not self.descriptors:
            a, b, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b, c))
        self.inputs = (a, b, c)
        self.device = a.device
        self.tables = (None, None, None, 1)
        if doubled:
            within, chunks = features.of_chunks(self.tile.chunk, sequences.total, a.dtype)
            self.tables = (within, chunks, features.of_begins(sequences), chunks.shape[1])

    def new_state(self, wanted: bool) -> Tensor:
        shape = (self.sequences.count, *self.state_shape) if wanted else (0,)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def new_crossing(self) -> Tensor | None:
        """Room for the states between stretches (see scan_kernel)."""
        if not self.features.flow:
            return None
        sequences = self.sequences
        if sequences.bounds is None:
            stretches = sequences.count * triton.cdiv(sequences.total, THETA_STRETCH)
        else:
            stretches = sequences.total // THETA_STRETCH + sequences.count
        # In half precision bf16: a state may be beyond fp16.
        dtype = torch.float32 if self.inputs[0].dtype == torch.float32 else torch.bfloat16
        shape = (stretches + 1, self.heads, self.slices, 2, self.tile.out, self.summed)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def run(
        self,
        out: Tensor,
        first: Tensor | None,
        *,
        last: Tensor | None = None,
        raw: Tensor | None = None,
        crossing: Tensor | None = None,
    ) -> Tensor | None:
        """Write the scan to `out` [B, T, H, C] and the final state to `last`. first: the state each piece starts from.

        raw: what `out` is the gradient of, where it runs back through the feature map. Returns the parts of theta's
        gradient [pieces, H, C], where that is wanted.
        """
        a, b, c = self.inputs
        sequences = self.sequences
        descriptors = self.descriptors and _describable(out)
        packed = sequences.bounds is not None
        flow = None
        if self.side != OUT_SIDE:
            raw = None
        elif raw.stride(-1) != 1:
            raw = raw.contiguous()
        if self.side == OUT_SIDE and self.features.flow:
            flow = torch.empty(sequences.pieces, self.heads, self.sizes[1], dtype=torch.float32, device=self.device)
        raw_strides = raw.stride()[:3] if raw is not None else (0, 0, 0)
        with torch.cuda.device_of(a):  # Triton launches on the current device
            scan_kernel[(sequences.pieces * self.heads * self.slices,)](
                self._argument(a, self.summed, descriptors),
                self._argument(b, self.summed, descriptors),
                self._argument(c, self.tile.out, descriptors),
                out if packed else self._argument(out, self.tile.out, descriptors),
                raw,
                self.decay,
                first,
                last,
                sequences.bounds,
                sequences.document,
                sequences.first,
                *self.tables[:3],
                flow,
                crossing if flow is not None else None,
                sequences.total,
                self.heads,
                sequences.segments,
                sequences.segment,
                sequences.count,
                self.tables[3],
                self.slices,
                *self.sizes,
                *a.stride()[:3],
                *b.stride()[:3],
                *c.stride()[:3],
                *out.stride()[:3],
                *raw_strides,
                *self.state_layout,
                REVERSE=self.reverse,
                RAGGED=packed or sequences.total % self.tile.chunk != 0,
                PACKED=packed,
                CUT=sequences.cut,
                HAS_FIRST=first is not None,
                HAS_LAST=last is not None,
                FLOW=0 if flow is None else THETA_STRETCH,
                DESCRIPTORS=descriptors,
                **self._constants(),
            )
        return flow

    def segment_starts(self, given: Tensor | None, last: Tensor | None = None) -> Tensor:
        """The state every piece starts from, [pieces, H, ...] as the states are; the final states go to `last`.

        given: the states that sequences start from.
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
                *self.tables[:3],
                sequences.total,
                self.heads,
                sequences.segments,
                sequences.segment,
                sequences.count,
                self.tables[3],
                self.slices,
                *self.sizes,
                *b.stride()[:3],
                *c.stride()[:3],
                *self.state_layout,
                REVERSE=self.reverse,
                PACKED=packed,
                CUT=sequences.cut,
                WITH_LAST=last is not None,
                DESCRIPTORS=self.descriptors,
                **self._constants(),
            )
            size, block = self.state_layout[3], 1024
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
            "FEATURES": self.side,
            "ACT": ACTIVATIONS[self.features.act],
            "LRPE": self.features.theta is not None,
            "CHUNK": self.tile.chunk,
            "SUMMED": self.summed,
            "OUT": self.tile.out,
            "STAGES": self.tile.stages,
            "num_warps": self.tile.warps,
        }

    def _argument(self, x: Tensor, columns: int, described: bool) -> Tensor | TensorDescriptor:
        return _descriptor(x, self.tile, columns) if described else x


def _tile(x: Tensor, out_width: int, features: Features, side: int) -> Tile:
    lrpe = None if features.theta is None else ("summed" if side == SUMMED_SIDE else "out")
    return tile_for(_capability(x), x.element_size(), padded(x.shape[-1]), padded(out_width), lrpe)


def _capability(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else HOPPER


def _given(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


def _describable(x: Tensor) -> bool:
    """Whether bulk copies can read and write x: 16-byte aligned rows, each element of its own."""
    step = 16 // x.element_size()
    row, time, head, one = x.stride()
    b, t, h, width = x.shape
    # Copies are of whole 16 bytes, so a width that is not would reach into the next head.
    return (
        one == 1
        and width % step == 0
        and (b == 1 or (row > 0 and row % step == 0))
        and (t == 1 or (time > 0 and time % step == 0))
        and (h == 1 or (head > 0 and head % step == 0))
        and x.data_ptr() % 16 == 0
    )


def _descriptor(x: Tensor, tile: Tile, columns: int) -> TensorDescriptor:
    """x [B, T, H, width] in tiles of one row and head, `tile.chunk` positions and `columns` of the width."""
    # The stride of a dimension of one is never used, but must look like one.
    strides = [s if n > 1 else 16 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, tile.chunk, 1, columns])
