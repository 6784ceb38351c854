"""Lightning attention's passes as decayed scans (triton_scan.py):

o  = scan(q, k, v)                dv = scan(k, q, do), in reverse
dq = scan(do, v, k)               dk = scan(v, do, q), in reverse
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.lightning import tiles
from kernels.lightning.inputs import AttentionInputs
from kernels.lightning.scan import Scan
from kernels.lightning.sequences import Sequences


def forward(inputs: AttentionInputs, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, T, H, V] in v's type, contiguous; the final state in fp32, empty unless return_state; and the segments'
    initial states for `backward`, [pieces, H, K, V] fp32, empty where no sequence is cut."""
    q, k, v, decay, initial_state, cu_seqlens = inputs
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    sequences = Sequences.of(q, v, cu_seqlens)
    scan = Scan(a=q, b=k, c=v, decay=decay, sequences=sequences)
    state = scan.new_state(return_state)
    given = _fp32(initial_state)
    starts = scan.segment_starts(given) if sequences.cut else None
    scan.run(o, given=given, starts=starts, last=state if return_state else None)
    return o, state, scan.new_state(wanted=False) if starts is None else starts


def backward(
    inputs: AttentionInputs, *, do: Tensor, dstate: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, in their types, and of the initial state, in fp32, empty where there is none.

    do: [B, T, H, V]. dstate: the gradient of the final state, None for zero. starts: from `forward`; None or empty:
    recomputed.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:3])
    sequences = Sequences.of(inputs.q, inputs.v, inputs.cu_seqlens)
    query_gradient(inputs, sequences, do=do, starts=starts, dq=dq)
    dinitial, _ = key_value_gradients(inputs, sequences, do=do, dstate=dstate, dk=dk, dv=dv)
    return dq, dk, dv, dinitial


def final_state(
    *,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> Tensor:
    """The state after the last position, [B or documents, H, K, V] fp32, without the output.

    reverse: sum from the last position to the first. With k = q, v = do and initial_state = dstate this is the gradient
    of the initial state.
    """
    sequences = Sequences.of(k, v, cu_seqlens, states_alone=True)
    scan = Scan(a=k, b=k, c=v, decay=decay, sequences=sequences, reverse=reverse)
    last = scan.new_state()
    scan.segment_starts(_fp32(initial_state), last)
    return last


class Crossing(NamedTuple):
    """What the scans of dq and dk compute for dtheta (the formula is at CROSSING in triton_scan.py).

    between: [stretches, H, d, K], states of the scan of dq every THETA_STRETCH positions. flow: [pieces, H, K] fp32,
    written by the scan of dk.
    """

    between: Tensor
    flow: Tensor


def query_gradient(
    inputs: AttentionInputs,
    sequences: Sequences,
    *,
    do: Tensor,
    starts: Tensor | None,
    dq: Tensor,
    for_theta: bool = False,
) -> Crossing | None:
    """Write dq [B, T, H, K], of any strides. It does not depend on the gradient of the final state.

    for_theta: q and k are LRPE features, K = 2 d, and dtheta is wanted.
    """
    scan = Scan(a=do, b=inputs.v, c=inputs.k, decay=inputs.decay, sequences=sequences, transposed=True)
    given = _fp32(inputs.initial_state)
    if not sequences.cut:
        starts = None
    elif starts is None or not starts.numel():
        starts = scan.segment_starts(given)
    if not for_theta:
        scan.run(dq, given=given, starts=starts)
        return None
    flow = torch.empty(sequences.pieces, *scan.state_shape[:2], dtype=torch.float32, device=do.device)
    crossing = Crossing(scan.new_crossing(), flow)
    scan.run(dq, given=given, starts=starts, crossing=crossing.between)
    return crossing


def key_value_gradients(
    inputs: AttentionInputs,
    sequences: Sequences,
    *,
    do: Tensor,
    dstate: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    crossing: Crossing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write dk and dv, of any strides; return the initial state's gradient, fp32, empty without an initial state, and
    with `crossing` the part of dtheta from pairs of positions in different stretches, [H, d] fp64."""
    q, k, v, decay = inputs[:4]
    initial_wanted = inputs.initial_state is not None
    for_dv = Scan(a=k, b=q, c=do, decay=decay, sequences=sequences, reverse=True)
    dinitial = for_dv.new_state(initial_wanted)
    given = _fp32(dstate)
    starts = for_dv.segment_starts(given) if sequences.cut else None
    for_dv.run(dv, given=given, starts=starts, last=dinitial if initial_wanted else None)
    for_dk = Scan(a=v, b=do, c=q, decay=decay, sequences=sequences, transposed=True, reverse=True)
    if crossing is None:
        for_dk.run(dk, given=given, starts=starts)
        return dinitial, None
    for_dk.run(dk, given=given, starts=starts, crossing=crossing.between, flow=crossing.flow)
    cos, sin = crossing.flow.sum(0, dtype=torch.float64).chunk(2, dim=-1)
    return dinitial, (cos + sin) * tiles.THETA_STRETCH


def _fp32(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()
