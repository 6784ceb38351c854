"""Matrix products with weights split over tensor-parallel ranks, overlapped with their collectives.

    column   y_i = X W_i^T, W_i [out, in] split along `out`: needs X whole; the gradient of X is a sum over ranks
    row      Y = sum over ranks of x W^T, W [out, in] split along `in`

With `rows` = 0 every rank holds all tokens between split layers, and sums over ranks are all-reduces. Otherwise each
rank holds a slice of the `rows` tokens (Megatron's sequence parallelism, arXiv 2205.05198; parallel/sequence.py): sums
are reduce-scatters, and inputs are all-gathered. Each collective overlaps with a product:

                       collective                    product that runs meanwhile
    column, forward    all-gather of x               y of this rank's own slice
    column, backward   all-gather of x               dx
                       reduction of dx               dW
    row, forward       reduction of a chunk of y     the next chunk of y
    row, backward      all-gather of dy              dx of this rank's own slice

Column forward, row forward and row backward are registered operators, one node each for compilers, selective
recomputation and dry runs; they take a process group by name. Column backward uses PyTorch's operators and functional
collectives. precision/matmul.py computes the products.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_tn.precision.gradient_sum import gradient_sum
from megatron_tn.precision.matmul import forward_product, input_gradient, weight_gradient

collectives = torch.ops._c10d_functional  # asynchronous: call wait_tensor on the result

# Row products are computed in chunks of tokens: the reduction of one chunk overlaps with the product of the next. At
# most CHUNKS chunks of at least CHUNK_TOKENS[device type] tokens (smaller products leave a GPU idle).
CHUNKS = 4
CHUNK_TOKENS = {"cuda": 1024}


def column_products(x: Tensor, weights: list[Tensor], group: str, rows: int = 0) -> list[Tensor]:
    """x [T, in], or this rank's slice [S, in] of `rows` tokens; weights [out_i, in] -> [T or rows, out_i] each.

    Collective over `group`. The backward pass, also collective, sums dx over the products and reduces it once.
    """
    return torch.ops.megatron_tn.column_forward(x, weights, group, rows)


def row_product(
    x: Tensor, weight: Tensor, group: str, rows: int = 0, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, in], weight [out, in] -> y = sum over ranks of x weight^T, [T, out]; with `rows` = T, this rank's slice
    [S, out]. Also the sum over ranks of `beside` [T], sliced like y; [0] where `beside` is None.

    Collective over `group`. beside: one number per token, reduced in its own dtype while the product runs.
    """
    y, beside = torch.ops.megatron_tn.row_forward(x, weight, group, rows, beside)
    return y, beside


def slice_length(rows: int, ranks: int) -> int:
    """S = ceil(rows / ranks), tokens per slice; the last slices are padded with zeros."""
    return -(-rows // ranks)


@torch.library.custom_op("megatron_tn::column_forward", mutates_args=())
def _column_forward(x: Tensor, weights: list[Tensor], group: str, rows: int) -> list[Tensor]:
    if not rows:
        return [forward_product(x, weight) for weight in weights]
    outs = [x.new_empty(rows, weight.shape[0]) for weight in weights]
    for tokens, piece in Gathering(x, resolve(group), rows):
        for out, weight in zip(outs, weights, strict=True):
            forward_product(piece, weight, out=out[tokens])
    return outs


@torch.library.custom_op("megatron_tn::row_forward", mutates_args=())
def _row_forward(
    x: Tensor, weight: Tensor, group: str, rows: int, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(slice_length(rows, resolve(group).size()) if rows else x.shape[0], weight.shape[0])
    return y, summed_over_ranks(x, lambda piece, out: forward_product(piece, weight, out=out), y, group, rows, beside)


def summed_over_ranks(
    x: Tensor, product: Callable[[Tensor, Tensor], object], y: Tensor, group: str, rows: int, beside: Tensor | None
) -> Tensor:
    """Write to y [T or S, out] the sum over ranks of what `product(tokens of x, out)` writes to `out`; see
    `row_product`. Returns the sum of `beside`, [0] where that is None."""
    ranks = resolve(group)
    in_flight = []
    summed = y.new_empty(0)
    if beside is not None:
        start = start_reduce_scatter if rows else start_all_reduce_
        summed, work = start(padded(beside, ranks.size()) if rows else beside.clone(), ranks)
        in_flight.append(work)
    for chunk in _chunks(len(y), x.device):
        if rows:
            part = _part_of_every_slice(x, product, chunk, y, ranks.size())
            in_flight.append(start_reduce_scatter(part, ranks, out=y[chunk])[1])
        else:
            product(x[chunk], y[chunk])
            in_flight.append(start_all_reduce_(y[chunk], ranks)[1])
    for work in in_flight:
        work.wait()
    return summed


@torch.library.custom_op("megatron_tn::row_backward", mutates_args=())
def _row_backward(
    gradient: Tensor, beside: Tensor, weight: Tensor, group: str, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """gradient: this rank's slice of dy [S, out]. beside: this rank's slice of dbeside, [S] or [0].
    -> dx [rows, in], dy [rows, out], dbeside [rows] or [0]."""
    ranks = resolve(group)
    gathering = Gathering(gradient, ranks, rows)
    small = Gathering(beside, ranks, rows) if beside.numel() else None
    dx = gradient.new_empty(rows, weight.shape[1])
    for tokens, piece in gathering:
        input_gradient([piece], [weight], out=dx[tokens])
    return dx, gathering.whole, beside.new_empty(0) if small is None else small.wait()


class Gathering:
    """The constructor starts an all-gather of slices x [S, ...] into `whole` [rows, ...], valid after `wait`.

    Iterating yields (token range, tokens): this rank's own slice first, before the wait, then all others.
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


def _part_of_every_slice(
    x: Tensor, product: Callable[[Tensor, Tensor], object], chunk: slice, y: Tensor, ranks: int
) -> Tensor:
    """What `product` makes of tokens `chunk` of every rank's slice, of y's length, stacked by rank: [ranks *
    len(chunk), out], the input of a reduce-scatter. Padding tokens give zeros."""
    size = len(y)
    if chunk == slice(0, size):
        part = y.new_empty(ranks * size, y.shape[1])
        product(x, part[: x.shape[0]])
        part[x.shape[0] :].zero_()
        return part
    length = chunk.stop - chunk.start
    part = y.new_empty(ranks * length, y.shape[1])
    for rank in range(ranks):
        start, stop = (min(rank * size + edge, x.shape[0]) for edge in (chunk.start, chunk.stop))
        end = rank * length + stop - start
        product(x[start:stop], part[rank * length : end])
        part[end : (rank + 1) * length].zero_()
    return part


def _chunks(tokens: int, device: torch.device) -> list[slice]:
    count = max(min(CHUNKS, tokens // CHUNK_TOKENS.get(device.type, tokens + 1)), 1)
    edges = [tokens * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


def padded(x: Tensor, ranks: int) -> Tensor:
    """x [rows, ...] padded with zero rows to a multiple of `ranks`."""
    rows = x.shape[0]
    missing = ranks * slice_length(rows, ranks) - rows
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


def start_all_reduce_(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Starts the all-reduce of x in place; x holds the sum over ranks after `work.wait()`."""
    return x, dist.all_reduce(x, group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup, out: Tensor | None = None) -> tuple[Tensor, dist.Work]:
    """Starts the reduce-scatter of x [ranks * S, ...] into `out` [S, ...], valid after `work.wait()`."""
    if out is None:
        out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)


def resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


@_column_forward.register_fake
def _column_forward_fake(x, weights, group, rows):
    return [x.new_empty(rows or x.shape[0], weight.shape[0]) for weight in weights]


@_row_forward.register_fake
def _row_forward_fake(x, weight, group, rows, beside=None):
    size = slice_length(rows, resolve(group).size()) if rows else x.shape[0]
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
        x = collectives.all_gather_into_tensor(x.contiguous(), resolve(ctx.group).size(), ctx.group)
    dx = start_sum_of_gradients(input_gradient(gradients, weights), ctx.group, ctx.rows)
    if ctx.rows:
        x = collectives.wait_tensor(x)[: ctx.rows]
    dweights = [weight_gradient(sum, gradient, x) for sum, gradient in zip(ctx.sums, gradients, strict=True)]
    return collectives.wait_tensor(dx), dweights, None, None


def start_sum_of_gradients(dx: Tensor, group: str, rows: int) -> Tensor:
    """Starts the sum over ranks of dx [T, in]. Returns the sum or, with `rows`, this rank's slice of the sum; valid
    after `wait_tensor`."""
    if not rows:
        return collectives.all_reduce(dx, "sum", group)  # not in place: compilers have no rule for all_reduce_
    ranks = resolve(group).size()
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
    else:  # y = sum over ranks, all tokens on each rank: dy is the gradient of every rank's term
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
