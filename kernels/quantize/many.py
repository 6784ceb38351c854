"""Quantisation of all weights of a model, once a step: two launches, where one a matrix would keep the host busy for
longer than the GPU (80 matrices of a 1B model: 6.1 ms, and 1.6 ms replayed as a CUDA graph)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch
from kernels.quantize.op import MULTIPLE, largest, padded, quantize_

ALIGNED = 16  # bytes of the widest load
SCALE_STRIDE = 4  # fp32 numbers from one scale to the next: products want them at multiples of 16 bytes


class ManyMatrices:
    """fp8 operands of groups of matrices, in one buffer whose address does not change.

    shapes: for each group the shapes [C_i, D] of the matrices that are stacked to one operand [sum of C_i, D].
    operands: for each group rows, transposed and scale, as of `kernels.quantize.op.quantize` of the stacked matrix.
    """

    def __init__(self, shapes: Sequence[Sequence[torch.Size]], dtype: torch.dtype, device: torch.device):
        self.shapes = shapes
        heights, widths = [sum(shape[0] for shape in group) for group in shapes], [group[0][1] for group in shapes]
        sizes = [(c, padded(d), padded(c)) for c, d in zip(heights, widths, strict=True)]
        # Zeros: padding is never written.
        self.buffer = torch.zeros(sum(d * (c + more) for c, d, more in sizes), dtype=torch.uint8, device=device).view(
            dtype
        )
        self.scales = torch.zeros(len(shapes), SCALE_STRIDE, device=device)
        self.operands, start = [], 0
        for group, (c, d, more) in enumerate(sizes):
            rows, transposed = self.buffer[start:].split([c * d, d * more, len(self.buffer) - start - d * (c + more)])[
                :2
            ]
            self.operands.append((rows.view(c, d), transposed.view(d, more), self.scales[group, :1]))
            start += d * (c + more)
        self.plan: object | None = None  # of triton_many.py

    @torch.no_grad()
    def quantize_(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Write the operands of the matrices, which have `shapes`."""
        first = groups[0][0]
        if dispatch.choose("quantize", first) == "triton" and self._launchable(groups):
            from kernels.quantize import triton_many

            addresses = [matrix.data_ptr() for group in groups for matrix in group]
            if self.plan is None or self.plan.addresses != addresses:
                self.plan = triton_many.Plan(self, groups, addresses)
            triton_many.quantize(first, self)
            return
        for group, operand in zip(groups, self.operands, strict=True):
            whole = stacked(group)
            quantize_(whole, largest(whole), *operand)

    def _launchable(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the kernels load and store whole vectors; of 16-bit numbers alone (triton_quantize.py)."""
        return all(
            matrix.element_size() == 2
            and matrix.is_contiguous()
            and not any(size % MULTIPLE for size in matrix.shape)
            and matrix.data_ptr() % ALIGNED == 0
            for group in groups
            for matrix in group
        )


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """[sum of C_i, D], without a copy of a single matrix."""
    return matrices[0].detach() if len(matrices) == 1 else torch.cat([matrix.detach() for matrix in matrices])
