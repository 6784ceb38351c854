"""The launches around lightning attention's that make it gated linear attention on the fused projection."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.lightning import launch
from kernels.lightning.configs import THETA_STRETCH, padded
from kernels.lightning.fused import Exchange
from kernels.lightning.triton_features import ACTIVATIONS, feature_gradients_kernel, features_kernel
from kernels.rows import as_rows

# Tokens and columns a program reads at once, how often, with how many warps: measured best for the gradients with LRPE,
# all alike for the others.
ROWS, COLUMNS, STEPS, WARPS = 2, 2048, 8, 8


@dataclass(frozen=True)
class FeatureMap:
    """act, and LRPE where theta [H, 1, d] is given; positions [T] or [B, T], None for 0, 1, ... in every row."""

    heads: int
    act: str
    theta: Tensor | None
    positions: Tensor | None

    @property
    def trivial(self) -> bool:
        return self.act == "none" and self.theta is None

    def apply(self, qkvu: Tensor, features: Tensor | None = None, *, queries: bool = True, keys: bool = True) -> Tensor:
        """The features of q and k, [B, T, 2, H, d] or [B, T, 2, H, 2 d]; in `features` where it is given."""
        batch, total, fused = qkvu.shape
        width = fused // 4 // self.heads
        shape = (batch, total, 2, self.heads, width if self.theta is None else 2 * width)
        if features is None:
            features = torch.empty(shape, dtype=qkvu.dtype, device=qkvu.device)
        rows, constants = as_rows(qkvu), self._constants(qkvu)
        with torch.cuda.device_of(qkvu):
            features_kernel[(triton.cdiv(batch * total, ROWS), triton.cdiv(fused // 4, constants["COLUMNS"]))](
                rows,
                self._theta,
                self.positions,
                features,
                rows.stride(0),
                *self._numbers(batch, total, width),
                QUERIES=queries,
                KEYS=keys,
                **constants,
            )
        return features

    def gradients(
        self, dfeatures: Tensor | None, qkvu: Tensor, dqkvu: Tensor, bounds: Tensor | None, theta_wanted: bool
    ) -> Tensor | None:
        """Turn the features' gradients into those of q and k, in dqkvu, contiguous; dfeatures None: they are there.

        Returns the near part of theta's gradient, [H, d] in fp64, where it is wanted.
        """
        batch, total, fused = qkvu.shape
        width = fused // 4 // self.heads
        programs = triton.cdiv(batch * total, ROWS * STEPS)
        flow = weight = None
        if theta_wanted:
            flow = torch.empty(programs, fused // 4, dtype=torch.float32, device=qkvu.device)
            weight = weights(bounds, total)
        rows, source = as_rows(qkvu), dqkvu if dfeatures is None else dfeatures
        constants = self._constants(qkvu)
        with torch.cuda.device_of(qkvu):
            feature_gradients_kernel[(programs, triton.cdiv(fused // 4, constants["COLUMNS"]))](
                rows,
                self._theta,
                self.positions,
                weight,
                source,
                dqkvu,
                flow,
                rows.stride(0),
                source.stride(1) if total > 1 else source.stride(0),
                fused,
                *self._numbers(batch, total, width),
                THETA_STRETCH,
                middle(total),
                STEPS=STEPS,
                **constants,
            )
        return None if flow is None else flow.sum(0, dtype=torch.float64).view(self.heads, width)

    @property
    def _theta(self) -> Tensor | None:
        return None if self.theta is None else self.theta.contiguous()

    def _numbers(self, batch: int, total: int, width: int) -> tuple[int, ...]:
        x = self.positions
        strides = (0, 0) if x is None else (0 if x.dim() == 1 else x.stride(0), x.stride(-1))
        return batch * total, total, *strides, self.heads * width, width

    def _constants(self, x: Tensor) -> dict:
        return {
            "ACT": ACTIVATIONS[self.act],
            "QUICK": x.dtype == torch.bfloat16,
            "ROWS": ROWS,
            "COLUMNS": min(COLUMNS, padded(x.shape[-1] // 4)),
            "num_warps": WARPS,
        }


def middle(length: int | Tensor) -> float | Tensor:
    """The middle of the first stretch of sequences of `length` positions, from which theta's gradient counts."""
    if isinstance(length, Tensor):
        return (length.clamp(min=1, max=THETA_STRETCH) - 1) / 2
    return (min(length, THETA_STRETCH) - 1) / 2


def weights(bounds: Tensor | None, total: int) -> Tensor | None:
    """Every token's distance from the middle of its stretch [T], fp32; None where rows are not packed."""
    if bounds is None:
        return None
    token = torch.arange(total, dtype=torch.int32, device=bounds.device)
    document = torch.searchsorted(bounds, token, right=True) - 1
    return ((token - bounds[document]) % THETA_STRETCH - middle(bounds.diff())[document]).to(torch.float32)


def backward(
    do: Tensor,
    dstate: Tensor | Exchange | None,
    qkvu: Tensor,
    dqkvu: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    features: Tensor | None,
    decay: Tensor,
    feature_map: FeatureMap,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    starts: Tensor | None,
    state: Tensor | None,
    theta_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Writes dq, dk, dv; returns the gradients of the initial state (fp32, empty without one) and of theta.

    parts, gradients: q, k, v and where their gradients go, views of qkvu and dqkvu. features: of q and k, None where
    they are q and k themselves.
    """
    q, k, v = parts
    dq, dk, dv = gradients
    dfeatures = None
    if features is not None:
        q, k = features.unbind(2)
        if feature_map.theta is not None:
            dfeatures = torch.empty(features.shape, dtype=features.dtype, device=features.device)
            dq, dk = dfeatures.unbind(2)
    sequences = launch.Sequences.of(q, v, cu_seqlens)
    cu_seqlens = sequences.bounds
    arriving = None
    if callable(dstate):
        arriving = dstate(launch.state(q, do, decay, None, cu_seqlens, reverse=True))
    crossing = launch.query_gradient(dq, do, k, v, decay, initial_state, starts, sequences, theta_wanted)
    if arriving is not None:
        dstate = arriving()
    dinitial, far = launch.key_value_gradients(
        dk, dv, do, q, k, v, dstate, decay, sequences, initial_state is not None, crossing
    )
    dtheta = None
    if not feature_map.trivial:
        dtheta = feature_map.gradients(dfeatures, qkvu, dqkvu, cu_seqlens, theta_wanted)
    if not theta_wanted:
        return dinitial, None
    dtheta += far
    # What crosses a sequence's ends is no difference of two of its positions: it counts from position 0.
    if initial_state is not None:
        dtheta += turned(initial_state, dinitial, _first_origin(feature_map, qkvu, cu_seqlens))
    if dstate is not None:
        dtheta -= turned(state, dstate, _last_origin(feature_map, qkvu, cu_seqlens))
    return dinitial, dtheta[:, None]


def turned(state: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """[H, d] fp64: the sum over sequences of weight times what turning their states would change."""
    (cos, sin), (dcos, dsin) = (x.to(torch.float64).chunk(2, dim=2) for x in (state, gradient))
    return torch.einsum("nhk,n->hk", (dcos * sin - dsin * cos).sum(-1), weight)


def _first_origin(feature_map: FeatureMap, qkvu: Tensor, bounds: Tensor | None) -> Tensor:
    """The position of the middle of every sequence's first stretch, [sequences] fp64."""
    count = qkvu.shape[0] if bounds is None else bounds.shape[0] - 1
    begin = torch.zeros(count, dtype=torch.float64, device=qkvu.device)
    if feature_map.positions is not None:
        if bounds is None:
            begin += feature_map.positions[..., 0]
        else:
            begin += feature_map.positions.flatten()[bounds[:-1].clamp(max=qkvu.shape[1] - 1).long()]
    return begin + (middle(qkvu.shape[1]) if bounds is None else middle(bounds.diff()))


def _last_origin(feature_map: FeatureMap, qkvu: Tensor, bounds: Tensor | None) -> Tensor:
    """The same of its last stretch."""
    first = _first_origin(feature_map, qkvu, bounds)
    length = torch.full_like(first, qkvu.shape[1]) if bounds is None else bounds.diff().to(first.dtype)
    return first + ((length - 1).clamp(min=0) // THETA_STRETCH) * THETA_STRETCH
