"""Gradients are reduced while the backward pass goes on, each once, and in its last microbatch alone."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_tn.gradients.accumulator import Bucket, GradientAccumulator, split_into_buckets
from megatron_tn.parallel.context import Axis
from tests.helpers.ranks import layout, run_shared

LAYERS, WIDTH = 6, 8
PADDING = 4  # elements of a buffer that are no parameter's, so that it has equal parts


class Chain(nn.Module):
    """Linear layers one after the other, the first one's weight used at the end as well; and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.unused = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return (x @ self.layers[0].weight).square().sum()


def reduced(elements: int, partitioned: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """After three microbatches: this rank's sums, those that one all-reduce at the end gives, in buffers of the same
    form, and how many buckets had been sent when each layer's gradient was made in the last microbatch."""
    torch.manual_seed(0)
    model = Chain()
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]]
    groups = [members for group in groups for members in split_into_buckets(group, elements)]
    flats = [torch.full((sum(p.numel() for p in group) + PADDING,), torch.nan) for group in groups]
    expected = [torch.zeros_like(flat) for flat in flats]
    buckets = [Bucket(group, flat) for group, flat in zip(groups, flats, strict=True)]
    totals = {
        parameter: total
        for group, wanted in zip(groups, expected, strict=True)
        for parameter, total in zip(group, Bucket(group, wanted).sums(), strict=True)
    }
    axis = layout().data
    accumulator = GradientAccumulator(buckets, axis, partitioned=partitioned)
    works = axis.size if partitioned else 1  # of a bucket: on a CPU each part is reduced to its rank
    sent: list[int] = []
    for layer in model.layers:
        layer.weight.register_post_accumulate_grad_hook(lambda _: sent.append(len(accumulator._works) // works))
    for microbatch in range(3):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * dist.get_rank() + microbatch))
        gradients = torch.autograd.grad(model(x), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[parameter] += gradient
        sent.clear()
        accumulator.backward(model(x), last=microbatch == 2)
        if microbatch < 2:
            assert not any(sent)
            assert any(accumulator.empty)  # the unused weight's
    accumulator.finish()
    assert all(accumulator.empty)
    for wanted in expected:
        dist.all_reduce(wanted)
    return flats, expected, sent


@pytest.mark.parametrize("partitioned", [False, True], ids=["to all", "to their owners"])
@pytest.mark.parametrize("elements", [1, 2 * WIDTH * WIDTH, 1 << 20], ids=["each", "two layers", "all"])
def test_sums_are_those_of_one_all_reduce(elements, partitioned):
    for rank, (found, expected, sent) in enumerate(run_shared(2, reduced, elements, partitioned)):
        for one, other in zip(found, expected, strict=True):
            half = len(one) // 2
            mine = slice(rank * half, (rank + 1) * half) if partitioned else slice(None)
            found_here = one[mine].isfinite()  # nothing is ever added to the padding
            assert (~found_here).sum() == (PADDING if rank or not partitioned else 0)
            torch.testing.assert_close(one[mine][found_here], other[mine][found_here])
        if elements == 1:  # biases apart, what came before in the backward pass
            assert sent == sorted(sent)
            assert sent[-1] > LAYERS
        elif elements == 2 * WIDTH * WIDTH:
            assert 0 < sent[-2] < LAYERS
        else:
            assert not any(sent[:-1])  # then the biases, a buffer of their own, are complete


def test_an_axis_of_one_rank_reduces_nothing():
    layer = nn.Linear(2, 2, bias=False)
    flat = torch.empty(4)
    accumulator = GradientAccumulator([Bucket([layer.weight], flat)], Axis())
    accumulator.backward(layer(torch.ones(1, 2)).sum(), last=True)
    assert not accumulator.reduces
    assert flat.tolist() == [1, 1, 1, 1]


def test_buckets_fill_up_in_the_order_of_the_backward_pass():
    parameters = [nn.Parameter(torch.empty(size)) for size in (1, 9, 2, 3, 4, 5)]
    found = [[p.numel() for p in members] for members in split_into_buckets(parameters, 6)]
    assert found == [[4, 5], [9, 2, 3], [1]]
    assert [[p.numel() for p in members] for members in split_into_buckets(parameters, 100)] == [[1, 9, 2, 3, 4, 5]]
    assert split_into_buckets([], 6) == []
