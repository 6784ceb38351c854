"""The Triton kernel of lightning attention, in the interpreter (fp32, fp16) or on a GPU, on outputs filled with NaN."""

import pytest
import torch

import kernels
from kernels.lightning import sequences
from kernels.lightning.tiles import TILES, tile_for
from tests.kernels.support import TOLERANCE, WIDTHS, Attention, assert_close, strided

BOUNDS = (0, 5, 5, 37, 38, 103, 104, 104)
# The interpreter takes seconds a case: fp16 differs from fp32 by `narrow` alone, and widths by what they are padded to.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
LENGTHS = [
    pytest.param(length, dtype, marks=pytest.mark.full if dtype == torch.float16 and length != 65 else ())
    for dtype in (torch.float32, torch.float16)
    for length in (1, 31, 32, 33, 64, 65, 129)
]
SOME_WIDTHS = [
    pytest.param(w, marks=() if w in ((8, 8), (48, 64), (96, 128), (256, 16)) else pytest.mark.full) for w in WIDTHS
]


@pytest.mark.parametrize(("length", "dtype"), LENGTHS, ids=str)
def test_any_length(triton_device, length, dtype):
    Attention.random(length=length, batch=1, rates=(0.0, 0.5), dtype=dtype, device=triton_device).check()


@pytest.mark.parametrize("widths", SOME_WIDTHS, ids="{0[0]}x{0[1]}".format)
def test_any_width(triton_device, widths):
    Attention.random(length=35, batch=1, widths=widths, rates=(0.05,), device=triton_device).check()


@pytest.mark.parametrize("rate", [0.0, 1e-5, 8.0, 1e4])
def test_any_rate(triton_device, rate):
    Attention.random(length=70, batch=1, rates=(rate,), device=triton_device).check()


@DTYPES
def test_packed_documents(triton_device, dtype):
    Attention.random(length=104, rates=(0.0, 1.0), bounds=BOUNDS, dtype=dtype, device=triton_device).check()


def test_documents_do_not_leak(triton_device):
    case = Attention.random(length=104, bounds=BOUNDS, rates=(0.0,), device=triton_device)
    document = slice(38, 103)
    before = case.run()
    for x in (case.q, case.k, case.v, case.do):
        x[:, document] = 3 * x[:, document] - 1
    for name, old, new in case.changed_by(4, before):
        assert not torch.equal(old, new), name


def test_a_document_beyond_the_range_of_fp16_scales_no_other(triton_device):
    case = Attention.random(length=104, bounds=BOUNDS, rates=(0.0,), dtype=torch.float16, device=triton_device)
    document = slice(38, 103)
    case.q = case.q * 0.1
    before = case.run()
    for x in (case.q, case.k, case.do):
        x[:, document] *= 300
    case.changed_by(4, before)


def check_nan_stays(device: torch.device, dtype: torch.dtype, bounds: tuple[int, ...], document: int) -> None:
    case = Attention.random(length=bounds[-1], bounds=bounds, rates=(0.0, 0.9), dtype=dtype, device=device)
    positions = slice(*bounds[document : document + 2])
    before = case.run()
    for x in (case.q, case.k, case.v, case.do):
        x[:, positions] = float("nan")
    assert all(new.isnan().all() for _, _, new in case.changed_by(document, before))


@DTYPES
def test_a_document_of_nan_spoils_no_other(triton_device, dtype):
    check_nan_stays(triton_device, dtype, BOUNDS, 4)


@pytest.fixture
def short_segments(monkeypatch):
    """Cut every sequence into short segments, as only long ones on a GPU would be."""
    lengths = []

    def short(*, total, **others):
        lengths.append(total)
        return min(64, total)

    monkeypatch.setattr(sequences, "plan_segment", short)
    yield
    assert lengths


@DTYPES
@pytest.mark.parametrize("length", [128, 131, pytest.param(191, marks=pytest.mark.full)])
def test_segments_of_a_sequence(triton_device, short_segments, length, dtype):
    """Rates at which nothing is skipped between segments, at which much is, and at which almost all is."""
    rates = (0.0, 0.9, 8.0)
    Attention.random(length=length, batch=1, rates=rates, dtype=dtype, device=triton_device).check()


@DTYPES
def test_segments_of_packed_documents(triton_device, short_segments, dtype):
    bounds = (0, 0, 66, 67, 197, 261, 263, 263)
    Attention.random(length=263, bounds=bounds, rates=(0.0, 0.9), dtype=dtype, device=triton_device).check()


def test_documents_in_segments_do_not_leak(triton_device, short_segments):
    case = Attention.random(length=160, bounds=(0, 5, 75, 160), rates=(0.0,), device=triton_device)
    before, document = case.run(), slice(5, 75)
    for x in (case.q, case.k, case.v, case.do):
        x[:, document] = 3 * x[:, document] - 1
    case.changed_by(1, before)


@DTYPES
def test_a_document_of_nan_in_segments_spoils_no_other(triton_device, short_segments, dtype):
    check_nan_stays(triton_device, dtype, (0, 5, 75, 160), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (256, 128)], ids="{0[0]}x{0[1]}".format)
def test_bf16_segments_on_the_gpu(cuda, short_segments, widths):
    case = Attention.random(
        length=515, batch=2, widths=widths, rates=(0.0, 0.01, 8.0), dtype=torch.bfloat16, device=cuda
    )
    case.check()


def test_views_of_a_fused_projection(triton_device):
    Attention.random(length=40, batch=2, widths=(16, 16), rates=(0.1, 0.0), device=triton_device).check_views()


@pytest.mark.parametrize("bounds", [None, (0, 5, 40)], ids=["rows", "packed"])
def test_rates_and_bounds_with_strides(triton_device, bounds):
    """A layer's column of a table of rates, and every second bound of a longer list."""
    case = Attention.random(length=40, bounds=bounds, device=triton_device)
    case.decay = strided(case.decay)
    case.cu_seqlens = None if bounds is None else strided(case.cu_seqlens)
    case.check()
    case.decay = torch.tensor([0.3], device=triton_device).expand(3)  # one rate for all heads
    case.check()


def test_aligned_views_whose_output_is_not(triton_device):
    """One head of width 12 in rows of 16: bulk copies could read the inputs, but not write rows of 24 bytes."""
    case = Attention.random(
        length=40, batch=1, widths=(12, 12), rates=(0.1,), dtype=torch.float16, device=triton_device
    )
    for name in "qkv":
        padded = torch.zeros(1, 40, 1, 16, dtype=torch.float16, device=triton_device)
        padded[..., :12] = getattr(case, name)
        setattr(case, name, padded[..., :12])
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    o = kernels.lightning_attention(*leaves, case.decay)
    gradients = torch.autograd.grad(o, leaves, case.do)
    case.initial_state.zero_()
    case.dstate.zero_()
    expected = case.expected()
    assert_close("o dq dk dv", (o, *gradients), (expected[0], *expected[2:5]), TOLERANCE[torch.float16])


def test_expanded_output_gradient(triton_device):
    """sum() hands back a gradient whose strides are all zero."""
    case = Attention.random(length=40, batch=1, rates=(0.1,), device=triton_device)
    q, k, v, begin = case.leaves()
    kernels.lightning_attention(q, k, v, case.decay, initial_state=begin).sum().backward()
    case.do.fill_(1)
    case.dstate.zero_()
    assert_close("dq dk dv dinitial", (q.grad, k.grad, v.grad, begin.grad), case.expected()[2:], 1e-5)


def test_fp16_states_beyond_its_range(triton_device):
    """A slow head's state passes 65504 while o, q being small, does not: scaled on its way into the product."""
    case = Attention.random(length=96, batch=1, rates=(0.0,), dtype=torch.float16, device=triton_device)
    case.k = (case.k.abs() * 60).to(torch.float16)
    case.v = (case.v.abs() * 60).to(torch.float16)
    case.q = (case.q * 0.01).to(torch.float16)
    case.do, case.dstate = case.do * 1e-3, case.dstate * 1e-3
    values, expected = case.run(), case.expected()
    assert values[1].max() > 65504
    assert_close("o state", values[:2], expected[:2], 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", WIDTHS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_the_gpu(cuda, widths, dtype):
    Attention.random(length=257, widths=widths, dtype=dtype, device=cuda).check()


@pytest.mark.gpu
def test_bf16_packed_on_the_gpu(cuda):
    Attention.random(length=104, bounds=BOUNDS, dtype=torch.bfloat16, device=cuda).check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_long_sequences_on_the_gpu(cuda, dtype):
    """Against the fp64 chunked form on the same device, which the CPU tests hold to the recurrence."""
    rates = (0.0, 1e-5, 1e-3, 0.3, 8.0)
    case = Attention.random(length=65537, batch=1, widths=(64, 64), rates=rates, dtype=dtype, device=cuda)
    exact = Attention(*(x.double() if x is not None and x.is_floating_point() else x for x in vars(case).values()))
    values, expected = case.run(), exact.run()
    for head in range(len(rates)):
        pick = [(x[:, :, head] if i not in (1, 5) else x[:, head]) for i, x in enumerate(values)]
        want = [(x[:, :, head] if i not in (1, 5) else x[:, head]) for i, x in enumerate(expected)]
        assert_close("o state dq dk dv dinitial", pick, want, max(TOLERANCE[dtype], 1e-4))


@pytest.mark.gpu
def test_offsets_beyond_32_bits_on_the_gpu(cuda):
    """Positions 2^18 and a time stride of 16384 elements make offsets of 2^32."""
    length, stride = 2**18 + 3, 16384
    fused = torch.empty(1, length, 1, stride, dtype=torch.bfloat16, device=cuda)
    q, k, v = (fused[..., 32 * i : 32 * i + 32] for i in range(3))
    torch.manual_seed(0)
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape, device=cuda))
    decay = torch.tensor([0.01], device=cuda)
    o = kernels.lightning_attention(q, k, v, decay)
    expected = kernels.lightning_attention(q.contiguous(), k.contiguous(), v.contiguous(), decay)
    assert torch.equal(o, expected)


@pytest.mark.gpu
def test_two_runs_agree_bitwise_on_the_gpu(cuda):
    case = Attention.random(length=513, widths=(128, 128), dtype=torch.bfloat16, device=cuda)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), case.run(), strict=True))


def test_tiles_cover_every_width_and_refuse_old_gpus():
    for capability in (8, 9, 10):
        for element_bytes in (2, 4):
            for width in (16, 32, 64, 128, 256):
                assert tile_for(capability, element_bytes, width, 16).out == 16
    assert set(TILES) == {8, 9}
    with pytest.raises(ValueError, match="older than the oldest"):
        tile_for(7, 2, 64, 64)
