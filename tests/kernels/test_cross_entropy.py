"""The fused linear cross-entropy against the fp64 definition with whole logits, on one rank and on two."""

import importlib

import pytest
import torch
import torch.distributed as dist

import kernels
from kernels.cross_entropy import reference
from kernels.cross_entropy.op import default_chunk_tokens
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_rank_on_the_gpu(cuda, dtype):
    check(dtype, 7, cuda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton(triton_device, dtype, monkeypatch):
    """Rows of more than one block, and of a width that no block divides, in the interpreter and on the GPU."""
    triton_softmax = importlib.import_module("kernels.cross_entropy.triton_softmax")
    monkeypatch.setattr(triton_softmax, "BLOCK", 16)
    check(dtype, 7, triton_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_statistics_and_gradient_in_place(triton_device, dtype):
    """Against fp64; extreme logits, a row of which is whole columns apart; the padding's logits are poisoned."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9000, generator=draw) * 30
    logits[:, 8000:] = float("nan")
    logits[1] -= 1e2
    rows = torch.tensor([0, 4095, -1, 7999, 4096])
    kept = torch.tensor([True, True, True, True, False])
    exact = logits[:, :8000].double()
    normalizer = exact.logsumexp(1)
    wanted = (exact - normalizer[:, None]).exp()
    wanted[[0, 1, 3], rows[[0, 1, 3]]] -= 1
    wanted[4] = 0

    logits, rows, kept = (x.to(triton_device) for x in (logits, rows, kept))
    highest, sums = torch.ops.megatron_tn.softmax_statistics(logits, rows, 8000)
    assert_close("normalizer", [highest + sums[0].log()], [normalizer], 1e-6)
    picked = exact[range(5), rows.cpu().clamp(min=0)] * (rows.cpu() >= 0)
    assert torch.equal(sums[1].cpu().double(), picked)
    torch.ops.megatron_tn.softmax_gradient_(logits, rows, kept, normalizer.float().to(triton_device), 8000, dtype)
    gradient = logits.view(dtype)[:, :9000]
    assert not gradient[:, 8000:].any()
    assert_close("gradient", [gradient[:, :8000]], [wanted], 1e-5 if dtype == torch.float32 else 5e-4)


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
    assert default_chunk_tokens(16384, 64000, cuda=True) == 1024
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
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be >= 1"),
    ],
    ids=lambda p: "+".join(p) if isinstance(p, dict) else "",
)
def test_refusals_name_the_argument(changes, message):
    hidden, weight, targets = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        kernels.linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | changes))
