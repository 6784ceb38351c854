"""Matrix products with weights that are split over tensor parallel, and the collectives that hide behind them.

    column   y_i = X W_i^T, W_i [out, in] split along `out`: needs X whole; the gradient of X is a sum over ranks
    row      Y = sum over ranks of x W^T, W [out, in] split along `in`

Between split regions every rank holds the tokens whole, and sums over ranks are all-reduces; or, where `rows` is not 0,
its slice of the `rows` tokens (Megatron's sequence parallelism, arXiv 2205.05198; parallel/sequence.py): sums are then
reduce-scatters, and what is needed whole is gathered. A collective starts when what it sends is there and is waited for
where its result is wanted. In flight meanwhile:

    column, forward    all-gather of x               products of this rank's own slice
    column, backward   all-gather of x               the product for the gradient of x
                       reduction of that gradient    the products for the gradients of the weights
    row, forward       reduction of a chunk          the product of the next chunk
    row, backward      all-gather of the gradient    products of this rank's own slice

The products are registered operators, so that compilers, selective recomputation and dry runs see each as one; those
take a process group by its name. Column products backward are PyTorch's own operators, collectives that are begun and
waited for among them; so are the products for the weights' gradients
(precision/matmul.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_tn.precision.gradient_sum import gradient_sum
from megatron_tn.precision.matmul import forward_product, input_gradient, weight_gradient

collectives = torch.ops._c10d_functional  # asynchronous; wait_tensor gives the result

# A product is cut into chunks, so that one's collective runs beside the next one's product, where that pays: on devices
# named here, into CHUNKS at most, of as many tokens at least (shorter products leave a GPU idle).
CHUNKS = 4
CHUNK_TOKENS = {"cuda": 1024}


def column_products(x: Tensor, weights: list[Tensor], group: str, rows: int = 0) -> list[Tensor]:
    """x [T, in], or this rank's slice [S, in] of `rows` tokens; weights [out_i, in] -> [T or rows, out_i] each.

    Collective over `group`, as is its backward pass, which reduces the gradients that all products have for x at once.
    """
    return torch.ops.megatron_tn.column_forward(x, weights, group, rows)


def row_product(
    x: Tensor, weight: Tensor, group: str, rows: int = 0, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, in], weight [out, in] -> the sum over ranks of x weight^T: [T, out], or this rank's slice [S, out] of
    `rows` = T tokens; and likewise that of `beside` [T], [0] without one. Collective over `group`.

    beside: numbers that are summed in their own type while the product runs.
    """
    y, beside = torch.ops.megatron_tn.row_forward(x, weight, group, rows, beside)
    return y, beside


def slice_length(rows: int, ranks: int) -> int:
    """Tokens of each rank's slice; the last ones are filled up with zeros."""
    return -(-rows // ranks)


@torch.library.custom_op("megatron_tn::column_forward", mutates_args=())
def _column_forward(x: Tensor, weights: list[Tensor], group: str, rows: int) -> list[Tensor]:
    if not rows:
        return [forward_product(x, weight) for weight in weights]
    outs = [x.new_empty(rows, weight.shape[0]) for weight in weights]
    for tokens, piece in _Gathering(x, _resolve(group), rows):
        for out, weight in zip(outs, weights, strict=True):
            forward_product(piece, weight, out=out[tokens])
    return outs


@torch.library.custom_op("megatron_tn::row_forward", mutates_args=())
def _row_forward(
    x: Tensor, weight: Tensor, group: str, rows: int, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    ranks = _resolve(group)
    in_flight = []
    summed = x.new_empty(0)
    if beside is not None:
        start = start_reduce_scatter if rows else start_all_reduce_
        summed, work = start(padded(beside, ranks.size()) if rows else beside.clone(), ranks)
        in_flight.append(work)
    size = slice_length(rows, ranks.size()) if rows else x.shape[0]
    y = x.new_empty(size, weight.shape[0])
    for chunk in _chunks(size, x.device):
        if rows:
            part = _part_of_every_slice(x, weight, chunk, size, ranks.size())
            in_flight.append(start_reduce_scatter(part, ranks, out=y[chunk])[1])
        else:
            forward_product(x[chunk], weight, out=y[chunk])
            in_flight.append(start_all_reduce_(y[chunk], ranks)[1])
    for work in in_flight:
        work.wait()
    return y, summed


@torch.library.custom_op("megatron_tn::row_backward", mutates_args=())
def _row_backward(
    gradient: Tensor, beside: Tensor, weight: Tensor, group: str, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From slices of both results' gradients: the gradient of x; the first of the two whole; the second, if any."""
    ranks = _resolve(group)
    gathering = _Gathering(gradient, ranks, rows)
    small = _Gathering(beside, ranks, rows) if beside.numel() else None
    dx = gradient.new_empty(rows, weight.shape[1])
    for tokens, piece in gathering:
        input_gradient([piece], [weight], out=dx[tokens])
    return dx, gathering.whole, beside.new_empty(0) if small is None else small.wait()


class _Gathering:
    """An all-gather of token slices x [S, ...] that is in flight. `whole` [rows, ...] is there once it was waited for.

    Iterated, it gives token ranges that cover all, with their tokens: this rank's own first, which need no waiting.
    """

    def __init__(self, x: Tensor, group: dist.ProcessGroup, rows: int):
        self.own, self.rank, self.rows = x.contiguous(), group.rank(), rows
        filled = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        self.work = dist.all_gather_into_tensor(filled, self.own, group=group, async_op=True)
        self.whole = filled[:rows]

    def wait(self) -> Tensor:
        self.work.wait()
        return self.whole

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        size = self.own.shape[0]
        if size < CHUNK_TOKENS.get(self.own.device.type, size + 1):
            yield slice(0, self.rows), self.wait()
            return
        start, stop = (min(rank * size, self.rows) for rank in (self.rank, self.rank + 1))
        yield slice(start, stop), self.own[: stop - start]
        self.wait()
        for others in (slice(0, start), slice(stop, self.rows)):
            if others.start < others.stop:
                yield others, self.whole[others]


def _part_of_every_slice(x: Tensor, weight: Tensor, chunk: slice, size: int, ranks: int) -> Tensor:
    """The product of the tokens that `chunk` names within each rank's slice of `size`, [ranks * chunk, out]."""
    if chunk == slice(0, size):
        part = x.new_empty(ranks * size, weight.shape[0])
        forward_product(x, weight, out=part[: x.shape[0]])
        part[x.shape[0] :].zero_()
        return part
    length = chunk.stop - chunk.start
    part = x.new_empty(ranks * length, weight.shape[0])
    for rank in range(ranks):
        start, stop = (min(rank * size + edge, x.shape[0]) for edge in (chunk.start, chunk.stop))
        end = rank * length + stop - start
        forward_product(x[start:stop], weight, out=part[rank * length : end])
        part[end : (rank + 1) * length].zero_()
    return part


def _chunks(tokens: int, device: torch.device) -> list[slice]:
    count = max(min(CHUNKS, tokens // CHUNK_TOKENS.get(device.type, tokens + 1)), 1)
    edges = [tokens * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def padded(x: Tensor, ranks: int) -> Tensor:
    """x [rows, ...] filled up with zeros to a multiple of the ranks."""
    rows = x.shape[0]
    missing = ranks * slice_length(rows, ranks) - rows
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


def start_all_reduce_(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """x, which holds the sum over ranks when the work was waited for."""
    return x, dist.all_reduce(x, group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> tuple[Tensor, dist.Work]:
    """This rank's slice of the sum of x [ranks * S, ...] over ranks, there when the work was waited for; in `out`."""
    if out is None:
        out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)


def _resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


@_column_forward.register_fake
def _column_forward_fake(x, weights, group, rows):
    return [x.new_empty(rows or x.shape[0], weight.shape[0]) for weight in weights]


@_row_forward.register_fake
def _row_forward_fake(x, weight, group, rows, beside=None):
    size = slice_length(rows, _resolve(group).size()) if rows else x.shape[0]
    return x.new_empty(size, weight.shape[0]), x.new_empty(0) if beside is None else beside.new_empty(size)


@_row_backward.register_fake
def _row_backward_fake(gradient, beside, weight, group, rows):
    dx, whole = gradient.new_empty(rows, weight.shape[1]), gradient.new_empty(rows, gradient.shape[1])
    return dx, whole, beside.new_empty(rows if beside.numel() else 0)


def _column_save(ctx, inputs, output):
    x, weights, ctx.group, ctx.rows = inputs
    ctx.sums = [gradient_sum(weight) for weight in weights]
    ctx.save_for_backward(x, *weights)


def _column_differentiate(ctx, gradients):
    x, *weights = ctx.saved_tensors
    if ctx.rows:
        x = collectives.all_gather_into_tensor(x.contiguous(), _resolve(ctx.group).size(), ctx.group)
    dx = start_sum_of_gradients(input_gradient(gradients, weights), ctx.group, ctx.rows)
    if ctx.rows:
        x = collectives.wait_tensor(x)[: ctx.rows]
    dweights = [weight_gradient(sum, gradient, x) for sum, gradient in zip(ctx.sums, gradients, strict=True)]
    return collectives.wait_tensor(dx), dweights, None, None


def start_sum_of_gradients(dx: Tensor, group: str, rows: int) -> Tensor:
    """Each rank's columns make a part of dx [T, in]: the sum, or this rank's slice of it, when it was waited for."""
    if not rows:
        return collectives.all_reduce(dx, "sum", group)  # of a copy: compilers do not know the form that works in place
    ranks = _resolve(group).size()
    return collectives.reduce_scatter_tensor(padded(dx, ranks), "sum", ranks, group)


def _row_save(ctx, inputs, output):
    x, weight, ctx.group, ctx.rows, beside = inputs
    ctx.sum = gradient_sum(weight)
    ctx.has_beside = beside is not None
    ctx.save_for_backward(x, weight)


def _row_differentiate(ctx, gradient, beside):
    x, weight = ctx.saved_tensors
    if ctx.rows:
        dx, gradient, beside = torch.ops.megatron_tn.row_backward(gradient, beside, weight, ctx.group, ctx.rows)
    else:  # the gradient of a sum is each one's
        dx = input_gradient([gradient], [weight])
    return dx, weight_gradient(ctx.sum, gradient, x), None, None, beside if ctx.has_beside else None


_column_forward.register_autograd(_column_differentiate, setup_context=_column_save)
_row_forward.register_autograd(_row_differentiate, setup_context=_row_save)


@register_flop_formula(torch.ops.megatron_tn.column_forward)
def _column_flops(x_shape, weight_shapes, group, rows, *args, out_shape=None, **kwargs) -> int:
    return sum(2 * (rows or x_shape[0]) * outputs * inputs for outputs, inputs in weight_shapes)


@register_flop_formula(torch.ops.megatron_tn.row_forward)
def _row_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.megatron_tn.row_backward)
def _row_backward_flops(gradient_shape, beside_shape, weight_shape, group, rows, out_shape=None, **kwargs) -> int:
    return 2 * rows * weight_shape[0] * weight_shape[1]
