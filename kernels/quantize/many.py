"""Quantises all weights of a model, once a step, in two launches. One launch per matrix would keep the host busy longer
than the GPU (80 matrices of a 1B model: 6.1 ms, and 1.6 ms replayed as a CUDA graph)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch
from kernels.quantize.op import MULTIPLE, largest, padded, quantize_

ALIGNED = 16  # bytes of the widest load
SLOTS = 64  # integers of a group that programs share to note the largest element
SCALE_STRIDE = 4  # fp32 numbers from one scale to the next: products want them at multiples of 16 bytes


class ManyMatrices:
    """fp8 operands of groups of matrices, at addresses that do not change.

    shapes: for each group the shapes [C_i, D] of the matrices that are stacked to one operand [sum of C_i, D].
    bits: int32 [groups, SLOTS], for each group the `kernels.quantize.op.largest` of its matrices.
    operands: for each group rows, transposed and scale, as of `kernels.quantize.op.quantize` of the stacked matrix;
        with transposed=False an empty tensor takes the place of `transposed`.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[torch.Size]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        transposed: bool = True,
    ):
        self.bits = torch.zeros(len(shapes), SLOTS, dtype=torch.int32, device=device)
        self.operands: list[tuple[Tensor, Tensor, Tensor]] = []
        self.transposed = transposed
        self.plan: object | None = None  # a triton_many.Plan, made at first use
        heights, widths = [sum(shape[0] for shape in group) for group in shapes], [group[0][1] for group in shapes]
        sizes = [(c, padded(d), padded(c) if transposed else 0) for c, d in zip(heights, widths, strict=True)]
        # Zeros until the first `quantize_`, which also writes the padding.
        count = sum(d * (c + more) for c, d, more in sizes)
        self.buffer = torch.zeros(count, dtype=torch.uint8, device=device).view(dtype)
        self.scales = torch.zeros(len(shapes), SCALE_STRIDE, device=device)
        start = 0
        for group, (c, d, more) in enumerate(sizes):
            rows, other = self.buffer[start : start + d * (c + more)].split([c * d, d * more])
            self.operands.append((rows.view(c, d), other.view(d, more) if more else other, self.scales[group, :1]))
            start += d * (c + more)

    @torch.no_grad()
    def quantize_(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Write bits and operands of the matrices, which have `shapes`."""
        first = groups[0][0]
        if dispatch.choose("quantize", first) == "triton" and self._launchable(groups):
            from kernels.quantize import triton_many

            addresses = [matrix.data_ptr() for group in groups for matrix in group]
            offsets = [address - addresses[0] for address in addresses]
            if self.plan is None or self.plan.offsets != offsets:
                self.plan = triton_many.Plan(self, groups, offsets)
            triton_many.quantize(first, self)
            return
        for index, group in enumerate(groups):
            whole = stacked(group)
            self.bits[index] = largest(whole).amax()
            quantize_(whole, self.bits[index], *self.operands[index])

    def _launchable(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the Triton kernels can run: they load and store whole vectors, and only of 16-bit numbers
        (triton_quantize.py)."""
        return all(
            matrix.element_size() == 2
            and matrix.is_contiguous()
            and not any(size % MULTIPLE for size in matrix.shape)
            and matrix.data_ptr() % ALIGNED == 0
            for group in groups
            for matrix in group
        )


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """[sum of C_i, D]: a view of matrices that follow each other in one buffer, as an engine has; else a copy."""
    first, *others = matrices = [matrix.detach() for matrix in matrices]
    end = first.storage_offset() + first.numel()
    for matrix in others:
        follows = matrix.untyped_storage()._cdata == first.untyped_storage()._cdata and matrix.storage_offset() == end
        if not (follows and matrix.is_contiguous()):
            return torch.cat(matrices)
        end += matrix.numel()
    return first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())
