"""Launches the decayed scan (triton_scan.py) and the kernels that compute its segments' initial states."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import HOPPER, capability_of
from kernels.lightning import tiles
from kernels.lightning.descriptors import describable, descriptor
from kernels.lightning.sequences import Sequences
from kernels.lightning.tiles import padded, tile_for
from kernels.lightning.triton_scan import scan_kernel
from kernels.lightning.triton_segments import combine_kernel, piece_states_kernel

COMBINED = 1024  # elements of a state per program of combine_kernel


class Scan:
    """scan(a, b, c)_t = sum over s <= t of exp(-r (t - s)) (a_t . b_s) c_s. The constructor chooses the tile.

    a, b: [B, T, H, S], S the summed width. c: [B, T, H, C]. decay: [H].
    transposed: states are stored [C, S], not [S, C].
    reverse: sum over s >= t, with exp(-r (s - t)).
    """

    def __init__(
        self,
        *,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        decay: Tensor,
        sequences: Sequences,
        transposed: bool = False,
        reverse: bool = False,
    ):
        self.heads, self.device = a.shape[2], a.device
        self.summed_width, self.c_width = summed, width = a.shape[3], c.shape[3]
        self.decay, self.sequences, self.reverse = decay.to(torch.float32).contiguous(), sequences, reverse
        self.state_shape = (self.heads, width, summed) if transposed else (self.heads, summed, width)
        self.state_strides = (1, summed) if transposed else (width, 1)  # from row to row, column to column of [S, C]

        capability = capability_of(a)
        self.summed = padded(summed)
        self.tile = tile_for(capability, a.element_size(), self.summed, padded(width))
        self.slices = triton.cdiv(width, self.tile.out)
        self.descriptors = a.dtype.itemsize == 2 and capability >= HOPPER and all(map(describable, (a, b, c)))
        if not self.descriptors:
            a, b, c = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b, c))
        self.a, self.b, self.c = a, b, c
        self.ragged = sequences.packed or sequences.total % self.tile.chunk != 0

    def new_state(self, wanted: bool = True) -> Tensor:
        """Uninitialised states, one per sequence, fp32; an empty tensor unless wanted."""
        shape = (self.sequences.count, *self.state_shape) if wanted else (0,)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def new_crossing(self) -> Tensor:
        """Uninitialised states between stretches (CROSSING in triton_scan.py)."""
        sequences = self.sequences
        if sequences.packed:
            stretches = sequences.total // tiles.THETA_STRETCH + sequences.count
        else:
            stretches = sequences.count * triton.cdiv(sequences.total, tiles.THETA_STRETCH)
        # bf16 for fp16 inputs too: a state may exceed the range of fp16.
        dtype = torch.float32 if self.a.dtype == torch.float32 else torch.bfloat16
        return torch.empty(stretches + 1, *self.state_shape, dtype=dtype, device=self.device)

    def run(
        self,
        out: Tensor,
        *,
        given: Tensor | None,
        starts: Tensor | None,
        last: Tensor | None = None,
        crossing: Tensor | None = None,
        flow: Tensor | None = None,
    ) -> None:
        """Write the scan to `out` [B, T, H, C], of any strides, and the state after each sequence to `last`.

        given: [sequences, H, ...] fp32, the sequences' initial states; None for zero.
        starts: `segment_starts(given)`, where sequences are cut.
        crossing: from `new_crossing`: states between stretches, written by a forward scan, read by a reverse scan.
        flow: [pieces, H, C] fp32, written by a reverse scan: the sum, over the boundaries between stretches in a piece,
            of the products of its state and the forward scan's.
        """
        sequences = self.sequences
        descriptors = self.descriptors and describable(out)
        first = given if starts is None else starts
        fades = first if self.reverse else last  # a state that padding of a partial chunk would decay
        with torch.cuda.device_of(self.a):  # Triton launches on the current device
            scan_kernel[(sequences.pieces * self.heads * self.slices,)](
                a=self._operand(self.a, self.summed, descriptors),
                b=self._operand(self.b, self.summed, descriptors),
                c=self._operand(self.c, self.tile.out, descriptors),
                out=self._operand(out, self.tile.out, descriptors),
                out_pointer=out,
                decay_pointer=self.decay,
                first_state_pointer=first,
                last_state_pointer=last,
                crossing_pointer=crossing,
                flow_pointer=flow,
                a_row=self.a.stride(0),
                a_time=self.a.stride(1),
                a_head=self.a.stride(2),
                out_row=out.stride(0),
                out_time=out.stride(1),
                out_head=out.stride(2),
                RAGGED=sequences.packed or (self.ragged and fades is not None),
                HAS_FIRST=first is not None,
                FROM_ZERO=given is None,
                HAS_LAST=last is not None,
                CROSSING=0 if crossing is None else tiles.THETA_STRETCH,
                DESCRIPTORS=descriptors,
                **self._shared_arguments(),
            )

    def segment_starts(self, given: Tensor | None, last: Tensor | None = None) -> Tensor:
        """The initial state of every piece, [pieces, H, ...] fp32. The state after each sequence is written to `last`.

        given: [sequences, H, ...] fp32, the sequences' initial states; None for zero: the states of first pieces are
            then neither written here nor read by `run`.
        """
        sequences = self.sequences
        states = torch.empty(sequences.pieces, *self.state_shape, dtype=torch.float32, device=self.device)
        size = self.summed_width * self.c_width
        with torch.cuda.device_of(self.b):
            piece_states_kernel[(sequences.pieces * self.heads * self.slices,)](
                b=self._operand(self.b, self.summed, self.descriptors),
                c=self._operand(self.c, self.tile.out, self.descriptors),
                states_pointer=states,
                decay_pointer=self.decay,
                RAGGED=self.ragged,
                WITH_LAST=last is not None,
                DESCRIPTORS=self.descriptors,
                **self._shared_arguments(),
            )
            combine_kernel[(sequences.count * self.heads, triton.cdiv(size, COMBINED))](
                states_pointer=states,
                given_pointer=given,
                last_pointer=last,
                decay_pointer=self.decay,
                bounds_pointer=sequences.bounds,
                first_pointer=sequences.first,
                total=sequences.total,
                heads=self.heads,
                segments=sequences.segments,
                segment=sequences.segment,
                size=size,
                REVERSE=self.reverse,
                PACKED=sequences.packed,
                BLOCK=COMBINED,
            )
        return states

    def _shared_arguments(self) -> dict:
        """Arguments of both scan_kernel and piece_states_kernel."""
        sequences, tile = self.sequences, self.tile
        state_summed, state_c = self.state_strides
        return {
            "bounds_pointer": sequences.bounds,
            "document_pointer": sequences.document,
            "first_pointer": sequences.first,
            "total": sequences.total,
            "heads": self.heads,
            "segments": sequences.segments,
            "segment": sequences.segment,
            "sequences": sequences.count,
            "slices": self.slices,
            "summed_width": self.summed_width,
            "c_width": self.c_width,
            "b_row": self.b.stride(0),
            "b_time": self.b.stride(1),
            "b_head": self.b.stride(2),
            "c_row": self.c.stride(0),
            "c_time": self.c.stride(1),
            "c_head": self.c.stride(2),
            "state_summed": state_summed,
            "state_c": state_c,
            "REVERSE": self.reverse,
            "PACKED": sequences.packed,
            "CUT": sequences.cut,
            "CHUNK": tile.chunk,
            "SUMMED": self.summed,
            "OUT": tile.out,
            "STAGES": tile.stages,
            "num_warps": tile.warps,
        }

    def _operand(self, x: Tensor, columns: int, described: bool) -> Tensor | TensorDescriptor:
        return descriptor(x, self.tile.chunk, columns) if described else x
