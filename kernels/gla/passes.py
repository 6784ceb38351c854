"""Gated linear attention's passes on Triton: the feature map, lightning attention's scans, and the gate."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.gla import triton_gate
from kernels.gla.feature_map import FeatureMap
from kernels.gla.inputs import GlaInputs, Saved, parts
from kernels.gla.theta_gradient import end_terms
from kernels.lightning import passes as attention
from kernels.lightning.sequences import Sequences
from kernels.quantize.triton_quantize import note_rows


def forward(
    inputs: GlaInputs, features: Tensor | None, *, return_state: bool, largest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, T, H d] (o itself without a gate), the sum of o^2 [B, T] fp32, and as in lightning attention's forward pass
    the final state, o [B, T, H, d] and the segments' initial states. largest: zeros, to note y's largest element in."""
    q, k, v, u = inputs.parts
    if features is not None:
        q, k = features.unbind(2)
    o, state, starts = attention.forward(inputs.attention(q, k, v), return_state=return_state)
    y, square_sum = triton_gate.gate(o.flatten(2), u.flatten(2), gated=inputs.gate, largest=largest)
    return y, square_sum, state, o, starts


def backward(
    inputs: GlaInputs,
    saved: Saved,
    *,
    dy: Tensor | None,
    dsquare_sum: Tensor | None,
    dstate: Tensor | None,
    exchange: Callable[[Tensor], Callable[[], Tensor]] | None,
    theta_wanted: bool,
    dqkvu: Tensor,
    largest: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Write dqkvu [B, T, 4 H d]; return the initial state's gradient, fp32, empty without an initial state, and dtheta
    [H, 1, d], fp64, if wanted. Other arguments as in `kernels.gla.op.gradients`."""
    q, k, v, u = inputs.parts
    dq, dk, dv, du = parts(dqkvu, inputs.heads)
    do = triton_gate.gate_gradient(
        dy=dy,
        dsquare_sum=dsquare_sum,
        o=saved.o.flatten(2),
        u=u.flatten(2),
        du=du.flatten(2),
        gated=inputs.gate,
        largest=largest,
    ).view(v.shape)
    feature_map = FeatureMap(heads=inputs.heads, act=inputs.act, theta=inputs.theta, positions=inputs.positions)
    dfeatures = None
    if saved.features is not None:
        q, k = saved.features.unbind(2)
        if inputs.theta is not None:  # without LRPE, the features' gradients fit in place of dq and dk in dqkvu
            dfeatures = torch.empty(saved.features.shape, dtype=q.dtype, device=q.device)
            dq, dk = dfeatures.unbind(2)
    sequences = Sequences.of(q, v, inputs.cu_seqlens)
    inputs = inputs._replace(cu_seqlens=sequences.bounds)  # the same, contiguous
    given = inputs.attention(q, k, v)
    final_gradient = None
    if exchange is not None:
        own = attention.final_state(
            k=q, v=do, decay=inputs.decay, initial_state=None, cu_seqlens=inputs.cu_seqlens, reverse=True
        )
        final_gradient = exchange(own)
    crossing = attention.query_gradient(given, sequences, do=do, starts=saved.starts, dq=dq, for_theta=theta_wanted)
    if final_gradient is not None:
        dstate = final_gradient()
    dinitial, far = attention.key_value_gradients(
        given, sequences, do=do, dstate=dstate, dk=dk, dv=dv, crossing=crossing
    )
    near = None
    if not feature_map.trivial:
        near = feature_map.gradients(
            dfeatures,
            qkvu=inputs.qkvu,
            dqkvu=dqkvu,
            cu_seqlens=inputs.cu_seqlens,
            theta_wanted=theta_wanted,
            largest=largest,
        )
    if largest is not None:  # the scan, which writes dv, has no registers left
        for part in (dv,) if not feature_map.trivial else (dq, dk, dv):
            note_rows(part.flatten(2).flatten(0, 1), largest)
    if not theta_wanted:
        return dinitial, None
    ends = end_terms(inputs, dinitial=dinitial, dstate=dstate, state=saved.state)
    return dinitial, (near + far + ends)[:, None]
