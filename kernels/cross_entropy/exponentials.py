"""Launches the Triton kernels of the output head's product (triton_exponentials.py)."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cross_entropy.tiles import TILES, HeadTile
from kernels.cross_entropy.triton_exponentials import (
    exponentials_kernel,
    reference_kernel,
    repair_kernel,
    totals_kernel,
)
from kernels.dispatch import HOPPER, capability_of


def exponentials(
    *, hidden: Tensor, weight: Tensor, target_rows: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `head_exponentials` in steps.py."""
    tokens, depth = hidden.shape
    tile = _tile(hidden)
    tiles = triton.cdiv(weight.shape[0], tile.vocabulary)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    out = torch.empty(tokens, weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    reference, target_logits, highest, sums = new(tokens), new(tokens), new(tiles, tokens), new(tiles, tokens)
    with torch.cuda.device_of(hidden):
        reference_kernel[(tokens,)](
            hidden_pointer=hidden,
            weight_pointer=weight,
            target_row_pointer=target_rows,
            reference_pointer=reference,
            target_logit_pointer=target_logits,
            depth=depth,
            hidden_row=hidden.stride(0),
            weight_row=weight.stride(0),
            BLOCK=1024,
            num_warps=4,
        )
        if columns == 0:  # all rows are padding, so row 0's logit may be anything: totals_ replaces it
            reference.fill_(torch.finfo(reference.dtype).min)
        programs = triton.cdiv(tokens, tile.tokens) * tiles
        if tile.persistent:
            programs = min(programs, _multiprocessors(hidden))
        exponentials_kernel[(programs,)](
            reference_pointer=reference,
            highest_pointer=highest,
            sums_pointer=sums,
            STAGES=tile.stages,
            PERSISTENT=tile.persistent,
            **_product_arguments(tile, hidden=hidden, weight=weight, out=out, columns=columns),
        )
    return out, reference, target_logits, highest.amax(0), sums.sum(0)


def totals_(
    out: Tensor,
    *,
    sums: Tensor,
    reference: Tensor,
    hidden: Tensor,
    weight: Tensor,
    highest: Tensor,
    columns: int,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """See `head_totals_` in steps.py."""
    tokens, tile = hidden.shape[0], _tile(hidden)
    tiles = triton.cdiv(weight.shape[0], tile.vocabulary)
    used, total = torch.empty_like(reference), torch.empty_like(reference)
    repaired = torch.empty(tiles, tokens, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        repair_kernel[(triton.cdiv(tokens, tile.tokens) * tiles,)](
            reference_pointer=reference,
            highest_pointer=highest,
            sums_pointer=repaired,
            limit=limit,
            **_product_arguments(tile, hidden=hidden, weight=weight, out=out, columns=columns),
        )
        totals_kernel[(triton.cdiv(tokens, 32),)](
            sums_pointer=sums,
            repaired_pointer=repaired,
            reference_pointer=reference,
            highest_pointer=highest,
            used_pointer=used,
            total_pointer=total,
            tokens=tokens,
            tiles=tiles,
            limit=limit,
            BLOCK_T=32,
            BLOCK=64,
            num_warps=4,
        )
    return used, total


def _product_arguments(tile: HeadTile, *, hidden: Tensor, weight: Tensor, out: Tensor, columns: int) -> dict:
    """Arguments of both exponentials_kernel and repair_kernel."""
    described = capability_of(hidden) >= HOPPER and all(map(_describable, (hidden, weight, out)))
    operands = {"hidden": hidden, "weight": weight, "out": out}
    if described:
        blocks = {
            "hidden": [tile.tokens, tile.depth],
            "weight": [tile.vocabulary, tile.depth],
            "out": [tile.tokens, tile.vocabulary],
        }
        operands = {name: TensorDescriptor.from_tensor(x, blocks[name]) for name, x in operands.items()}
    return operands | {
        "tokens": hidden.shape[0],
        "columns": columns,
        "width": weight.shape[0],
        "depth": hidden.shape[1],
        "hidden_row": hidden.stride(0),
        "weight_row": weight.stride(0),
        "out_row": out.stride(0),
        "BLOCK_T": tile.tokens,
        "BLOCK_V": tile.vocabulary,
        "BLOCK_D": tile.depth,
        "DESCRIPTORS": described,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _tile(x: Tensor) -> HeadTile:
    return TILES[min(capability_of(x), max(TILES))]


def _multiprocessors(x: Tensor) -> int:
    """Multiprocessors of x's GPU; for Triton's interpreter few, so that a program computes several tiles."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def _describable(x: Tensor) -> bool:
    """Whether TMA bulk copies can read and write x [rows, width]: rows are aligned multiples of 16 bytes."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
