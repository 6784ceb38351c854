"""Overlaps of pieces of a logical tensor that two layouts cut differently.

A logical tensor is viewed as a matrix of shape[0] rows. An element range of a box is then at most three rectangles
(the end of a row, whole rows, the start of a row), and two pieces overlap where their rectangles do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tn.checkpoint.manifest import Piece
from megatron_tn.parallel.sharding import ShardSpec


class Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of the logical matrix."""

    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Grid:
    """Position of a piece in the logical matrix: corner and width of its box, and its first element in the box."""

    top: int
    left: int
    width: int
    start: int

    @classmethod
    def of(cls, piece: Piece) -> Grid:
        (top, _), *rest = piece.box
        # Boxes are cut along the first two dimensions at most, so the columns of a box are contiguous.
        inner = math.prod(stop - start for start, stop in rest[1:])
        left, width = (rest[0][0] * inner, (rest[0][1] - rest[0][0]) * inner) if rest else (0, 1)
        return cls(top, left, width, piece.start)

    def offset(self, row: int, column: int) -> int:
        """Index in the piece of the element at (row, column) of the logical matrix."""
        return (row - self.top) * self.width + (column - self.left) - self.start


def rectangles(piece: Piece) -> Iterator[Rectangle]:
    """The rectangles a piece covers, none of them empty."""
    grid = Grid.of(piece)
    position = piece.start
    while position < piece.stop:
        row, column = divmod(position, grid.width)
        if column == 0 and piece.stop - position >= grid.width:
            rows, columns = (piece.stop - position) // grid.width, grid.width
        else:
            rows, columns = 1, min(grid.width - column, piece.stop - position)
        left = grid.left + column
        yield Rectangle(grid.top + row, grid.top + row + rows, left, left + columns)
        position += rows * columns


def overlaps(a: Piece, b: Piece) -> Iterator[Rectangle]:
    """The rectangles of the logical matrix that lie in both pieces."""
    for one in rectangles(a):
        for other in rectangles(b):
            shared = Rectangle(
                max(one.top, other.top),
                min(one.bottom, other.bottom),
                max(one.left, other.left),
                min(one.right, other.right),
            )
            if shared.top < shared.bottom and shared.left < shared.right:
                yield shared


def bands(rectangle: Rectangle, elements: int) -> Iterator[Rectangle]:
    """`rectangle` in bands of whole rows, of at most `elements` elements or one row each."""
    rows = max(1, elements // (rectangle.right - rectangle.left))
    for top in range(rectangle.top, rectangle.bottom, rows):
        yield rectangle._replace(top=top, bottom=min(top + rows, rectangle.bottom))


def view_of(piece: Piece, values: Tensor, rectangle: Rectangle, first: int = 0) -> Tensor:
    """`rectangle` as a matrix that aliases `values` [n]: elements [first, first + n) of `piece`."""
    grid = Grid.of(piece)
    shape = (rectangle.bottom - rectangle.top, rectangle.right - rectangle.left)
    offset = grid.offset(rectangle.top, rectangle.left) - first
    return torch.as_strided(values, shape, (grid.width, 1), values.storage_offset() + offset)


def span_of(piece: Piece, rectangle: Rectangle) -> tuple[int, int]:
    """The elements [first, last) of `piece` from the first to the last one of `rectangle`."""
    grid = Grid.of(piece)
    return grid.offset(rectangle.top, rectangle.left), grid.offset(rectangle.bottom - 1, rectangle.right - 1) + 1


def pieces_of_local_range(spec: ShardSpec, rank: int, size: int, start: int, stop: int) -> Iterator[tuple[Piece, int]]:
    """Elements [start, stop) of a rank's flattened local parameter as pieces of the logical tensor.

    Yields (piece, index in the range at which it begins). Padding is in no piece.
    """
    if spec.blocks > 1 and spec.dim != 0:
        raise ValueError(f"a parameter of {spec.blocks} blocks must be split along dimension 0, not {spec.dim}")
    block_elements = math.prod(spec.local_shape(rank, size)) // spec.blocks
    for index, box in enumerate(spec.boxes(rank, size)):
        origin = index * block_elements
        elements = math.prod(stop - start for start, stop in box)
        first, last = max(start - origin, 0), min(stop - origin, elements)
        if first < last:
            yield Piece(box, first, last), origin + first - start
