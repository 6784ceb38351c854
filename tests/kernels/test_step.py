"""One token of decoding against the fp64 recurrence, and against gla token by token."""

import pytest
import torch

import kernels
from kernels.gla.buffered import gla_step_buffered_
from kernels.gla.step import gla_step
from kernels.gla.step_buffer import StepBuffer
from tests.kernels.gla_support import Gated
from tests.kernels.support import TOLERANCE, assert_close, strided

LRPE = pytest.mark.parametrize("with_lrpe", [False, True], ids=["plain", "lrpe"])


def decode(case: Gated):
    """The three results without autograd, which is what takes the one-token kernel, in both of its forms."""
    given = {"act": case.act, "gate": case.gate, "positions": case.positions}
    inputs = (case.qkvu, case.decay, case.theta)
    with torch.no_grad():
        y, square_sum, state = kernels.gla(*inputs, **given, initial_state=case.initial_state, return_state=True)
        if case.qkvu.shape[1] == 1:
            written = case.initial_state.clone()
            results = kernels.gla(*inputs, **given, initial_state=written, update_state=True)
            assert all(map(torch.equal, (*results[:2], written), (y, square_sum, state)))
            assert results[2] is None
    return y, square_sum, state


def check(**sizes) -> None:
    case = Gated.random(length=1, begin=70_001, **sizes)
    got, wanted = decode(case), case.exact()[:3]
    assert_close("y norm state", (got[0], got[1].sqrt(), got[2]), (wanted[0], wanted[1].sqrt(), wanted[2]),
                 TOLERANCE[case.qkvu.dtype])  # fmt: skip
    assert got[0].dtype == case.qkvu.dtype
    assert got[1].shape == case.qkvu.shape[:2]


@LRPE
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_plain_pytorch(dtype, with_lrpe):
    check(dtype=dtype, with_lrpe=with_lrpe)


@LRPE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 48, 80])
def test_triton(triton_device, width, dtype, with_lrpe):
    check(dtype=dtype, width=width, with_lrpe=with_lrpe, batch=3, device=triton_device)


@pytest.mark.parametrize("act", ["none", "1+elu", "relu"])
def test_triton_with_other_activations_and_no_gate(triton_device, act):
    check(act=act, gate=False, with_lrpe=act == "none", device=triton_device)


@pytest.mark.gpu
@LRPE
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("width", [64, 128])
def test_bf16_on_the_gpu(cuda, width, batch, with_lrpe):
    check(dtype=torch.bfloat16, width=width, batch=batch, with_lrpe=with_lrpe, device=cuda)


@LRPE
def test_triton_views_and_a_position_for_each_row(triton_device, with_lrpe):
    """A row of a wider tensor, and sequences of a batch that are at different positions."""
    case = Gated.random(length=1, batch=3, with_lrpe=with_lrpe, device=triton_device)
    case.decay = strided(case.decay)
    case.positions = torch.tensor([[5], [0], [4096]], device=triton_device)
    wide = torch.full((3, 1, 2 * case.qkvu.shape[-1]), float("nan"), device=triton_device)
    wide[..., : case.qkvu.shape[-1]] = case.qkvu
    case.qkvu = wide[..., : case.qkvu.shape[-1]]
    together = decode(case)
    for row in range(3):
        one = Gated(**vars(case))
        one.qkvu, one.positions = case.qkvu[row : row + 1], case.positions[row]
        one.initial_state = case.initial_state[row : row + 1]
        one.dy, one.dsquare_sum, one.dstate = (x[:1] for x in (case.dy, case.dsquare_sum, case.dstate))
        wanted = one.exact()[:3]
        assert_close("y norm state", [x[row : row + 1] for x in together], wanted, 1e-5)


@LRPE
def test_step_by_step_equals_the_whole(with_lrpe):
    case = Gated.random(length=9, with_lrpe=with_lrpe)
    y, square_sum, state = decode(case)
    now = case.initial_state
    for t in range(9):
        step = Gated(**vars(case))
        step.qkvu, step.positions, step.initial_state = case.qkvu[:, t : t + 1], case.positions[t : t + 1], now
        out, norm, now = decode(step)
        assert_close("y norm", (out[:, 0], norm[:, 0]), (y[:, t], square_sum[:, t]), 1e-5)
    assert_close("state", [now], [state], 1e-5)


def test_a_negative_rate_is_refused():
    case = Gated.random(length=1)
    case.decay = -case.decay
    with pytest.raises(ValueError, match="must be >= 0 and finite at every head"):
        decode(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 2}, "needs one token"),
        ({"dtype": torch.float64}, "must be contiguous and torch.float32"),
        ({"view": True}, "must be contiguous and torch.float32"),
    ],
    ids=["length", "dtype", "view"],
)
def test_a_state_that_cannot_be_written_over_is_refused(change, message):
    case = Gated.random(length=change.get("length", 1), with_lrpe=False)
    state = case.initial_state.to(change.get("dtype", torch.float32))
    state = state.mT if "view" in change else state
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        kernels.gla(case.qkvu, case.decay, None, act="silu", initial_state=state, update_state=True)


def test_gradients_are_not_lost():
    """With autograd on, one token goes the way that has a backward pass."""
    Gated.random(length=1).check()


BATCH, SLOTS = 3, 4  # of the buffered cases


def buffered_and_plain_steps(case: Gated, tokens: int, entering: int):
    """y, sum of o^2 and state after each of `tokens` steps: buffered, and by gla_step. Row 1 takes the state of a new
    sequence before step `entering`, which lies between two folds."""
    fresh = case.initial_state[1].flip(0).contiguous()
    device = case.qkvu.device
    slot, start = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(BATCH, dtype=torch.int64, device=device)
    buffer = StepBuffer.around(case.initial_state.clone(), SLOTS, case.qkvu.dtype, slot, start)
    state = case.initial_state.clone()
    found = []
    for t in range(tokens):
        if t == entering:
            state = state.clone()
            buffer.state[1], state[1], start[1] = fresh, fresh, slot[0]
        arguments = (case.decay, case.theta, case.act, case.gate, case.positions[t : t + 1])
        x = case.qkvu[:, t : t + 1]
        buffer = buffer._replace(fold=t % SLOTS == SLOTS - 1)
        got = gla_step_buffered_(x, *buffer, *arguments)
        *wanted, state = gla_step(x, state, *arguments)
        buffer.advance()
        found.append(((*got, buffer.folded(case.decay)), (*wanted, state)))
    return found


def check_buffered(tolerance: float, **sizes) -> None:
    tokens = 2 * SLOTS + 1  # two folds
    case = Gated.random(length=tokens, batch=BATCH, begin=70_001, **sizes)
    for got, wanted in buffered_and_plain_steps(case, tokens, entering=6):
        assert_close("y norm state", got, wanted, tolerance)


@LRPE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_buffered_steps_in_plain_pytorch(dtype, with_lrpe):
    check_buffered(TOLERANCE[dtype], dtype=dtype, with_lrpe=with_lrpe)


def test_a_fold_at_another_slot_than_the_last_is_refused():
    case = Gated.random(length=1, with_lrpe=False)
    slot, start = torch.zeros(1, dtype=torch.int64), torch.zeros(len(case.qkvu), dtype=torch.int64)
    buffer = StepBuffer.around(case.initial_state.clone(), SLOTS, case.qkvu.dtype, slot, start)._replace(fold=True)
    with pytest.raises(ValueError, match=f"fold=True with slot=0: a buffer of W={SLOTS} slots"):
        gla_step_buffered_(case.qkvu, *buffer, case.decay, None, case.act, case.gate, None)


@pytest.mark.parametrize(
    ("width", "with_lrpe"),
    [(8, True), (80, False), *(pytest.param(*case, marks=pytest.mark.full) for case in ((8, False), (80, True)))],
    ids=str,
)
def test_buffered_steps_in_triton(triton_device, width, with_lrpe):
    check_buffered(TOLERANCE[torch.float32], width=width, with_lrpe=with_lrpe, device=triton_device)


@pytest.mark.gpu
@LRPE
def test_buffered_steps_in_bf16_on_the_gpu(cuda, with_lrpe):
    check_buffered(TOLERANCE[torch.bfloat16], dtype=torch.bfloat16, width=128, with_lrpe=with_lrpe, device=cuda)
