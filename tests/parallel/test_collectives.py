"""Parts of flat buffers that ranks hold reach all of an axis."""

import subprocess
import sys

import pytest
import torch

from megatron_tn.parallel.collectives import gather_parts_
from tests.helpers.ranks import layout, run_shared

LENGTHS = [4, 64, 6]


def gathered(tp: int, device: str) -> tuple[int, list[torch.Tensor]]:
    context = layout(tp)
    buffers = [torch.full((length,), torch.nan, dtype=torch.bfloat16, device=device) for length in LENGTHS]
    for index, buffer in enumerate(buffers):
        buffer.chunk(context.data.size)[context.data.rank].fill_(10 * index + context.rank)
    gather_parts_(buffers, context.data)
    return context.tp.rank, [buffer.cpu() for buffer in buffers]


@pytest.mark.parametrize(
    ("world", "tp", "device"), [(1, 1, "cpu"), (4, 2, "cpu"), pytest.param(2, 1, "cuda", marks=pytest.mark.gpu(2))]
)
def test_every_rank_of_an_axis_has_all_parts(world, tp, device):
    ranks = run_shared(world, gathered, tp, device, device=device) if world > 1 else [gathered(tp, device)]
    for tp_rank, buffers in ranks:
        for index, (length, buffer) in enumerate(zip(LENGTHS, buffers, strict=True)):
            members = range(tp_rank, world, tp)
            parts = [torch.full((length // len(members),), 10.0 * index + rank) for rank in members]
            torch.testing.assert_close(buffer.float(), torch.cat(parts), rtol=0, atol=0)


def test_a_new_name_of_a_collective_is_no_news_to_a_user():
    warns = "import warnings; warnings.warn('`torch.distributed.all_gather` is deprecated', FutureWarning)"
    code = f"import megatron_tn.parallel.collectives; {warns}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stderr == b""
