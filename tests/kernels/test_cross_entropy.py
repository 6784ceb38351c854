"""The fused linear cross-entropy against the fp64 definition with whole logits, on one rank and on two."""

import importlib
import weakref

import pytest
import torch
import torch.distributed as dist

import kernels
from kernels.cross_entropy import op, reference
from kernels.cross_entropy.op import default_chunk_tokens
from kernels.cross_entropy.steps import head_exponentials, head_gradient_, head_totals_
from kernels.cross_entropy.tiles import TILES, HeadTile
from tests.kernels.support import assert_close, relative_error

TRUE, PADDED, IGNORED = 37, 44, -100
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def inputs(dtype, tokens=23, width=16, device="cpu"):
    """hidden, the weight of the padded vocabulary, and targets of which some are ignored and one is the last id."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(PADDED, width, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    targets = torch.randint(0, TRUE, (tokens,), generator=generator)
    targets[::5] = IGNORED
    targets[1] = TRUE - 1
    return hidden, weight, targets.to(device)


def expected(hidden, weight, targets):
    leaves = [x.detach().double().cpu().requires_grad_() for x in (hidden, weight)]
    loss, losses = reference.linear_cross_entropy(*leaves, targets.cpu(), vocab_size=TRUE)
    return [loss, losses, *torch.autograd.grad(loss * 0.25, leaves)]


def check(dtype, chunk, device="cpu"):
    hidden, weight, targets = inputs(dtype, device=device)
    loss, losses = kernels.linear_cross_entropy(hidden, weight, targets, vocab_size=TRUE, chunk_tokens=chunk)
    dhidden, dweight = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert_close(
        "loss losses dhidden dweight",
        (loss, losses, dhidden, dweight),
        expected(hidden, weight, targets),
        TOLERANCE[dtype],
    )
    assert not losses.requires_grad
    assert not losses[targets == IGNORED].any()
    assert not dhidden[targets == IGNORED].any()
    assert not dweight[TRUE:].any()
    assert (dhidden.dtype, dweight.dtype, loss.dtype) == (dtype, dtype, torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 23, 100, None])
def test_one_rank(dtype, chunk):
    check(dtype, chunk)


class Sum:
    """A gradient sum, twice whatever is added to it."""

    def add_scaled(self, gradient, factor):
        self.total = 2 * gradient * factor


def check_added(dtype, device="cpu"):
    hidden, weight, targets = inputs(dtype, device=device)
    found = Sum()
    loss, _ = kernels.linear_cross_entropy(hidden, weight, targets, vocab_size=TRUE, chunk_tokens=9, gradient_sum=found)
    (loss * 0.25).backward()
    assert weight.grad is None
    wanted = expected(hidden, weight, targets)
    assert_close("dhidden dweight", (hidden.grad, found.total / 2), wanted[2:], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_added_to_a_sum(dtype):
    check_added(dtype)


def test_a_gradient_added_to_a_sum_by_triton(triton_dtype, triton_device):
    check_added(triton_dtype, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_rank_on_the_gpu(cuda, dtype):
    check(dtype, 7, cuda)


SMALL = HeadTile(16, 32, 16, 4, 2, persistent=True)


@pytest.fixture(params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def triton_dtype(request, triton_device, monkeypatch):
    """The kernels' types: fp32 in the interpreter, which gets bf16 wrong, and bf16 on the GPU. Tiles are small, so that
    nothing divides and there are several."""
    if request.param == (torch.float32 if triton_device == "cuda" else torch.bfloat16):
        pytest.skip("not a type of these kernels here")
    head = importlib.import_module("kernels.cross_entropy.exponentials")  # of the interpreter, where that runs it
    monkeypatch.setattr(head, "TILES", dict.fromkeys(TILES, SMALL))
    return request.param


@pytest.mark.parametrize("chunk", [7, 23])
def test_triton(triton_dtype, triton_device, chunk):
    check(triton_dtype, chunk, triton_device)


def test_triton_where_the_target_is_far_below_the_highest_logit(triton_dtype, triton_device):
    """Rows whose exponentials are infinite at first stand beside rows whose are not, and are made again."""
    hidden, weight, targets = inputs(torch.float64)
    with torch.no_grad():
        hidden[2::3] *= 40  # losses of hundreds of nats
        hidden[4] *= -1e3
    leaves = [x.detach().to(triton_device, triton_dtype).requires_grad_() for x in (hidden, weight)]
    loss, losses = kernels.linear_cross_entropy(*leaves, targets.to(triton_device), vocab_size=TRUE, chunk_tokens=9)
    gradients = torch.autograd.grad(loss * 0.25, leaves)
    wanted = expected(*leaves, targets)
    assert wanted[1].max() > 200
    tolerance = TOLERANCE[triton_dtype]
    assert_close("loss losses dhidden dweight", (loss, losses, *gradients), wanted, max(tolerance, 5e-6))


def test_triton_of_a_rank_with_padding_alone(triton_dtype, triton_device):
    hidden, weight, _ = inputs(triton_dtype, device=triton_device)
    rows = torch.full(hidden.shape[:1], -1, device=triton_device)
    weight = weight.detach() * 100  # padding may hold anything
    made = head_exponentials(hidden, weight, rows, 0)
    highest = torch.full_like(made[3], 3.0)  # another rank's
    used, total = head_totals_(made[0], made[4], made[1], hidden, weight, highest, 0)
    assert not made[0].any()
    assert not total.any()
    scaled = torch.empty_like(hidden)
    scale = head_gradient_(made[0], scaled, hidden, rows, rows < 0, used, highest + 1, made[2])
    assert torch.allclose(scale, torch.full_like(scale, -1).exp())


def two_ranks(rank: int, folder: str) -> None:
    """Each rank holds half of the padded vocabulary, of which the second half's tail is padding."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    hidden, weight, targets = inputs(torch.float64)
    half = PADDED // 2
    mine = weight.detach()[rank * half :][:half].clone().requires_grad_()
    loss, losses = kernels.linear_cross_entropy(
        hidden, mine, targets, vocab_start=rank * half, vocab_size=TRUE, group=dist.group.WORLD, chunk_tokens=9
    )
    torch.save((loss, losses, *torch.autograd.grad(loss * 0.25, (hidden, mine))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_one_chunk_exists_at_a_time(monkeypatch):
    made = []

    def watched(*arguments):
        assert not any(reference() for reference in made)
        found = head_exponentials(*arguments)
        made.append(weakref.ref(found[0].untyped_storage()))
        return found

    monkeypatch.setattr(op, "head_exponentials", watched)
    check(torch.float32, 7)
    assert len(made) == 4


def test_two_ranks_equal_one(tmp_path):
    torch.multiprocessing.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    whole = (first[0], first[1], first[2] + second[2], torch.cat((first[3], second[3])))
    assert_close("loss losses dhidden dweight", whole, expected(*inputs(torch.float64)), 1e-12)


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs(torch.float32)
    loss, _ = kernels.linear_cross_entropy(hidden * 1e3, weight, targets, vocab_size=TRUE)
    (dhidden,) = torch.autograd.grad(loss, hidden)
    assert (
        relative_error(loss, reference.linear_cross_entropy(hidden * 1e3, weight, targets, vocab_size=TRUE)[0]) < 1e-6
    )
    assert dhidden.isfinite().all()


def test_backward_twice_gives_the_same():
    hidden, weight, targets = inputs(torch.float32)
    loss, _ = kernels.linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", ["hidden", "weight", "neither"])
def test_only_the_gradients_that_are_wanted(wanted):
    hidden, weight, targets = inputs(torch.float32)
    full = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    hidden.requires_grad_(wanted == "hidden")
    weight.requires_grad_(wanted == "weight")
    loss, _ = kernels.linear_cross_entropy(hidden, weight, targets)
    if wanted == "neither":
        assert not loss.requires_grad
    else:
        leaf = hidden if wanted == "hidden" else weight
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], full[wanted == "weight"])


def test_all_tokens_ignored():
    hidden, weight, targets = inputs(torch.float32)
    loss, losses = kernels.linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED))
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert not any(x.any() for x in (losses, *gradients))


def test_default_chunk_bounds_the_logits():
    assert default_chunk_tokens(16384, 64000, cuda=True) == 1984
    assert default_chunk_tokens(4096, 64000, cuda=True) == 448
    assert default_chunk_tokens(2048, 64000, cuda=True) == 262
    assert default_chunk_tokens(4096, 4096, cuda=False) == 512
    assert default_chunk_tokens(10, 64000, cuda=True) == 10


@pytest.mark.parametrize("target", [-1, TRUE, PADDED])
def test_targets_outside_the_vocabulary_are_refused(target):
    hidden, weight, targets = inputs(torch.float32)
    targets[3] = target
    with pytest.raises(ValueError, match=rf"targets\[3\]={target} is neither ignore_index=-100 nor in 0 .. .* = 36"):
        kernels.linear_cross_entropy(hidden, weight, targets, vocab_size=TRUE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(23, 15)}, r"hidden.shape=\(23, 15\) and weight.shape=\(44, 16\)"),
        ({"weight": torch.ones(44, 16).half()}, "must be one floating type"),
        ({"targets": torch.ones(22, dtype=torch.int64)}, r"targets is \(22,\)"),
        ({"targets": torch.ones(23, dtype=torch.int32)}, "torch.int32; it must be"),
        ({"vocab_start": -1}, "vocab_start=-1 must be >= 0"),
        ({"vocab_size": PADDED + 1}, "vocab_size=45 must be >= 1 and at most the 44 rows"),
        ({"vocab_size": 0}, "vocab_size=0 must be >= 1 and at most the 44 rows"),
        ({"hidden": torch.ones(0, 16)}, r"hidden.shape=\(0, 16\) and .* with T and V at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be >= 1"),
    ],
    ids=lambda p: "+".join(p) if isinstance(p, dict) else "",
)
def test_refusals_name_the_argument(changes, message):
    hidden, weight, targets = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | changes))
