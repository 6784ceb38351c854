"""Launches the Triton kernels of the feature map and its gradients (triton_features.py)."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.activations.triton_activations import ACTIVATIONS
from kernels.gla.theta_gradient import distances_from_middle, middle_of_first
from kernels.gla.triton_features import feature_gradients_kernel, features_kernel
from kernels.lightning import tiles
from kernels.lightning.tiles import padded
from kernels.quantize.noted import SLOTS
from kernels.rows import as_rows

# Tokens and columns per step of a program, its steps, and its warps. Measured best for the gradients with LRPE; the
# other three cases (forward, or without LRPE) do not depend on them.
ROWS, COLUMNS, STEPS, WARPS = 2, 2048, 8, 8


@dataclass(frozen=True)
class FeatureMap:
    """x -> act(x), or LRPE(act(x)) with theta [H, 1, d]. positions: [T] or [B, T], None for 0, 1, ... in every row."""

    heads: int
    act: str
    theta: Tensor | None
    positions: Tensor | None

    @property
    def trivial(self) -> bool:
        """Whether the feature map is the identity."""
        return self.act == "none" and self.theta is None

    def apply(self, qkvu: Tensor, features: Tensor | None = None, *, queries: bool = True, keys: bool = True) -> Tensor:
        """The features of q and k, [B, T, 2, H, d], or [B, T, 2, H, 2 d] with LRPE; into `features` where given.

        queries, keys: whether to write the features of q, and of k.
        """
        batch, total, fused = qkvu.shape
        width = fused // 4 // self.heads
        if features is None:
            shape = (batch, total, 2, self.heads, width if self.theta is None else 2 * width)
            features = torch.empty(shape, dtype=qkvu.dtype, device=qkvu.device)
        rows, shared = as_rows(qkvu), self._shared_arguments(qkvu)
        with torch.cuda.device_of(qkvu):
            features_kernel[(triton.cdiv(batch * total, ROWS), triton.cdiv(fused // 4, shared["COLUMNS"]))](
                x_pointer=rows,
                features_pointer=features,
                x_row=rows.stride(0),
                QUERIES=queries,
                KEYS=keys,
                **shared,
            )
        return features

    def gradients(
        self,
        dfeatures: Tensor | None,
        *,
        qkvu: Tensor,
        dqkvu: Tensor,
        cu_seqlens: Tensor | None,
        theta_wanted: bool,
        largest: Tensor | None = None,
    ) -> Tensor | None:
        """Write dq and dk into dqkvu [B, T, 4 H d], contiguous, from the gradients of the features.

        dfeatures: shaped as the features; None where dqkvu already holds them in place of dq and dk.
        largest: int32 [SLOTS], notes or zeros, to note the largest element of dq and dk in.
        Returns, if theta_wanted, the term `near` of dtheta, [H, d] fp64, as defined in theta_gradient.py.
        """
        batch, total, fused = qkvu.shape
        programs = triton.cdiv(batch * total, ROWS * STEPS)
        flow = weight = None
        if theta_wanted:
            flow = torch.empty(programs, fused // 4, dtype=torch.float32, device=qkvu.device)
            weight = None if cu_seqlens is None else distances_from_middle(cu_seqlens, total)
        rows, source = as_rows(qkvu), dqkvu if dfeatures is None else dfeatures
        shared = self._shared_arguments(qkvu)
        with torch.cuda.device_of(qkvu):
            feature_gradients_kernel[(programs, triton.cdiv(fused // 4, shared["COLUMNS"]))](
                x_pointer=rows,
                weight_pointer=weight,
                gradient_pointer=source,
                out_pointer=dqkvu,
                flow_pointer=flow,
                largest_pointer=largest,
                SLOTS=SLOTS,
                x_row=rows.stride(0),
                gradient_row=source.stride(1) if total > 1 else source.stride(0),
                out_row=fused,
                stretch=tiles.THETA_STRETCH,
                middle=middle_of_first(total),
                STEPS=STEPS,
                **shared,
            )
        return None if flow is None else flow.sum(0, dtype=torch.float64).view(self.heads, -1)

    def _shared_arguments(self, qkvu: Tensor) -> dict:
        """Arguments of both kernels."""
        batch, total, fused = qkvu.shape
        width, positions = fused // 4, self.positions
        row = 0 if positions is None or positions.dim() == 1 else positions.stride(0)
        return {
            "theta_pointer": None if self.theta is None else self.theta.contiguous(),
            "positions_pointer": positions,
            "tokens": batch * total,
            "total": total,
            "positions_row": row,
            "positions_time": 0 if positions is None else positions.stride(-1),
            "width": width,
            "head_width": width // self.heads,
            "ACT": ACTIVATIONS[self.act],
            "QUICK": qkvu.dtype == torch.bfloat16,
            "ROWS": ROWS,
            "COLUMNS": min(COLUMNS, padded(width)),
            "num_warps": WARPS,
        }
