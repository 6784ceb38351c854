"""Splits of logical parameters: parts are disjoint, cover everything, and come back together."""

import pytest
import torch

from megatron_tn.parallel.sharding import ShardSpec
from tests.helpers.ranks import layout, run_shared

SPECS = {
    "replicated": ShardSpec((5,)),
    "columns": ShardSpec((12, 5), dim=0),
    "rows": ShardSpec((5, 12), dim=1),
    "uneven columns": ShardSpec((10, 3), dim=0),
    "uneven rows": ShardSpec((3, 10), dim=1),
    "fused": ShardSpec((48, 5), dim=0, blocks=4),
    "vocabulary": ShardSpec((101, 3), dim=0, padded=104),
    "vocabulary with a rank of padding alone": ShardSpec((5, 3), dim=0, padded=8),
    "theta": ShardSpec((8, 1, 3), dim=0),
}


def values(spec: ShardSpec) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(spec.shape).numel()).view(spec.shape)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_boxes_cover_every_element_once(spec, size):
    seen = torch.zeros(spec.shape)
    for rank in range(size if spec.dim is not None else 1):
        for box in spec.boxes(rank, size):
            seen[tuple(slice(*edge) for edge in box)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_part_has_the_announced_shape_and_zero_padding(spec, size):
    parts = [spec.take(values(spec), rank, size) for rank in range(size)]
    assert [tuple(part.shape) for part in parts] == [spec.local_shape(rank, size) for rank in range(size)]
    total = sum(part.sum() for part in parts) / (size if spec.replicated else 1)
    assert total == values(spec).sum()


def test_the_fused_projection_gives_each_rank_its_heads_of_q_k_v_and_u():
    whole = torch.arange(8).view(8, 1)  # two heads of width 1 each in q, k, v, u
    spec = ShardSpec((8, 1), dim=0, blocks=4)
    assert spec.take(whole, 0, 2).flatten().tolist() == [0, 2, 4, 6]
    assert spec.take(whole, 1, 2).flatten().tolist() == [1, 3, 5, 7]


def gather_all(size: int) -> dict[str, torch.Tensor]:
    axis = layout(size).tp
    return {name: spec.gather(spec.take(values(spec), axis.rank, size), axis) for name, spec in SPECS.items()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gather_undoes_take(size):
    for found in run_shared(size, gather_all, size) if size > 1 else [gather_all(size)]:
        for name, spec in SPECS.items():
            assert torch.equal(found[name], values(spec)), name
