"""Lightning attention in plain PyTorch against the fp64 recurrence, and its contract."""

import pytest
import torch

import kernels
from kernels.lightning.reference import recurrence
from tests.kernels.support import TOLERANCE, WIDTHS, Attention, assert_close, relative_error

BOUNDS = (0, 5, 5, 69, 70, 198, 200, 200, 200)  # empty documents, one of a chunk's length, one longer, padding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 128, 129])
def test_any_length(length, dtype):
    Attention.random(length=length, dtype=dtype).check()


@pytest.mark.parametrize("widths", WIDTHS, ids="{0[0]}x{0[1]}".format)
def test_any_width(widths):
    Attention.random(length=130, batch=1, widths=widths, rates=(0.003, 0.5)).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bounds", [None, BOUNDS], ids=["rows", "packed"])
def test_half_precision(dtype, bounds):
    Attention.random(length=200, widths=(64, 64), bounds=bounds, dtype=dtype).check()


@pytest.mark.parametrize("rate", [0.0, 1e-5, 0.004, 0.7, 8.0, 1e4])
def test_any_rate(rate):
    Attention.random(length=150, rates=(rate,)).check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bounds", [BOUNDS, (0, 200), (0, 0, 0, 200), tuple(range(0, 201, 8))], ids=str)
def test_packed_documents(bounds, dtype):
    Attention.random(length=200, bounds=bounds, dtype=dtype).check()


def test_documents_do_not_leak():
    """A change in document 2 changes the others by exactly nothing, output, state and gradient, with slow decay."""
    case = Attention.random(length=200, bounds=BOUNDS, rates=(0.0, 1e-4))
    document = slice(70, 198)
    before = case.run()
    for x in (case.q, case.k, case.v, case.do):
        x[:, document] = 3 * x[:, document] - 1
    case.initial_state[4] += 1
    case.dstate[4] -= 1
    for name, old, new in case.changed_by(4, before):
        assert not torch.equal(old, new), name


def test_two_halves_equal_the_whole():
    case = Attention.random(length=150, dtype=torch.float64)
    q, k, v, begin = case.leaves()
    o1, middle = kernels.lightning_attention(
        q[:, :61], k[:, :61], v[:, :61], case.decay, initial_state=begin, return_state=True
    )
    o2, end = kernels.lightning_attention(
        q[:, 61:], k[:, 61:], v[:, 61:], case.decay, initial_state=middle, return_state=True
    )
    o = torch.cat((o1, o2), dim=1)
    gradients = torch.autograd.grad((o, end), (q, k, v, begin), (case.do, case.dstate))
    assert_close("o state dq dk dv dinitial", (o, end, *gradients), case.expected(), 1e-12)


def test_one_token_at_a_time_equals_the_whole():
    case = Attention.random(length=20)
    state, outputs = case.initial_state, []
    for t in range(20):
        step = slice(t, t + 1)
        o, state = kernels.lightning_attention(
            case.q[:, step], case.k[:, step], case.v[:, step], case.decay, initial_state=state, return_state=True
        )
        outputs.append(o)
    assert_close("o state", (torch.cat(outputs, 1), state), case.expected()[:2], 1e-6)


@pytest.mark.parametrize("bounds", [None, (0, 30, 70)], ids=["rows", "packed"])
def test_views_of_a_fused_projection(bounds):
    Attention.random(bounds=bounds, widths=(16, 16)).check_views()


def test_gradient_through_the_state_alone():
    case = Attention.random()
    q, k, v, begin = case.leaves()
    _, state = kernels.lightning_attention(q, k, v, case.decay, initial_state=begin, return_state=True)
    gradients = torch.autograd.grad(state, (q, k, v, begin), case.dstate)
    case.do.zero_()
    assert not gradients[0].any()
    assert_close("dk dv dinitial", gradients[1:], case.expected()[3:], 1e-5)


def test_65537_positions():
    """Slow and fast heads at once. The gradients are recurrences too, as chunked.py says; run as one batch."""
    case = Attention.random(length=65537, batch=1, widths=(8, 8), rates=(0.0, 1e-5, 0.3, 8.0), dtype=torch.bfloat16)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype) for x in case.leaves()[:3]]
        o = kernels.lightning_attention(*leaves, case.decay)
        found[dtype] = (o, *torch.autograd.grad(o, leaves, case.do.to(dtype)))
    with torch.no_grad():
        q, k, v, do = (x.double() for x in (case.q, case.k, case.v, case.do))
        scans = ((q, k, v), (do, v, k), (v.flip(1), do.flip(1), q.flip(1)), (k.flip(1), q.flip(1), do.flip(1)))
        o_exact, dq, dk, dv = recurrence(*(torch.cat(x) for x in zip(*scans, strict=True)), case.decay)[0]
    for dtype, values in found.items():
        for head in range(4):
            expected = [x[:, head] for x in (o_exact, dq, dk.flip(0), dv.flip(0))]
            assert_close("o dq dk dv", [x[0, :, head] for x in values], expected, TOLERANCE[dtype])


def test_state_is_fp32_for_half_inputs_and_optional():
    case = Attention.random(dtype=torch.bfloat16)
    o, state = kernels.lightning_attention(case.q, case.k, case.v, case.decay, return_state=True)
    assert (o.dtype, state.dtype, tuple(state.shape)) == (torch.bfloat16, torch.float32, (2, 3, 16, 24))
    assert torch.equal(o, kernels.lightning_attention(case.q, case.k, case.v, case.decay))
    assert relative_error(state, case.expected()[1]) > 1e-2  # which had an initial state
    case.initial_state.zero_()
    assert relative_error(state, case.expected()[1]) < 1e-6


def broken(**changes):
    case = Attention.random(bounds=(0, 30, 70))
    arguments = {"q": case.q, "k": case.k, "v": case.v, "decay": case.decay, "cu_seqlens": case.cu_seqlens}
    arguments |= {name: change(arguments.get(name)) for name, change in changes.items()}
    return arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": lambda x: x[:, 1:]}, r"k.shape=\(1, 69, 3, 16\) must equal q.shape"),
        ({"v": lambda x: x[:, :, :1]}, "v.shape=.* must equal q.shape"),
        ({"v": lambda x: x.half()}, "q, k, v have types"),
        ({"q": lambda x: x[0]}, r"q.shape=\(70, 3, 16\) must have four"),
        ({"decay": lambda x: x[:2]}, r"decay.shape=\(2,\) must be \[H\] = \(3,\)"),
        ({"decay": lambda x: x.bfloat16()}, "decay.dtype=torch.bfloat16"),
        ({"decay": lambda x: -x}, "must be >= 0 and finite at every head"),
        ({"decay": lambda x: x / 0}, r"decay=\[nan, inf, inf\] must be >= 0 and finite"),
        ({"decay": lambda x: x.to("meta")}, "decay.device=meta must be that of the other inputs, cpu"),
        ({"v": lambda x: x.to("meta")}, "v.device=meta must be that of the other inputs, cpu"),
        ({"cu_seqlens": lambda x: x.to("meta")}, "cu_seqlens.device=meta must be that of the other inputs, cpu"),
        ({"cu_seqlens": lambda x: x - 1}, r"cu_seqlens=\[-1, 29, 69\] must rise from 0 to T=70"),
        ({"cu_seqlens": lambda x: x.flip(0)}, "must rise from 0"),
        ({"cu_seqlens": lambda x: x.float()}, "cu_seqlens.dtype=torch.float32"),
        ({"initial_state": lambda x: torch.zeros(1, 3, 16, 24)}, r"initial_state.shape=.* must be \(2, 3, 16, 24\)"),
        ({"q": lambda x: x[:, :0], "k": lambda x: x[:, :0], "v": lambda x: x[:, :0]}, "length T=0 must be at least 1"),
    ],
    ids=lambda p: "+".join(p) if isinstance(p, dict) else "",
)
def test_refusals_name_the_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.lightning_attention(**broken(**changes))


def test_packing_needs_one_row():
    case = Attention.random()
    with pytest.raises(ValueError, match="so B must be 1"):
        kernels.lightning_attention(
            case.q, case.k, case.v, case.decay, cu_seqlens=torch.tensor([0, 70], dtype=torch.int32)
        )
