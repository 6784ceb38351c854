"""The same layouts on CUDA devices with NCCL: `make test-gpu`."""

import dataclasses
import functools

import pytest
import torch

from megatron_tn import load_pretrained
from megatron_tn.config import EngineConfig
from megatron_tn.parallel import products
from megatron_tn.parallel.context import ParallelContext
from tests.engine.test_parity import (
    ALL_PARTITIONED,
    FSDP2,
    LOCAL,
    RMSNORM,
    ZERO,
    ZERO_BF16,
    check_gradients,
    name_of,
    train,
    train_each,
)
from tests.helpers.golden import NAMES, golden, relative_to_max
from tests.helpers.gradients import in_chunks
from tests.helpers.models import TINY
from tests.helpers.ranks import layout, run_shared
from tests.helpers.replicas import assert_replicas_equal, replicated

pytestmark = pytest.mark.gpu
TWO = pytest.mark.gpu(2)
FOUR = pytest.mark.gpu(4)
LAYOUTS = [
    pytest.param(1, 1, id="1-gpu"),
    pytest.param(2, 1, marks=TWO, id="2-gpus-dp2"),
    pytest.param(2, 2, marks=TWO, id="2-gpus-tp2"),
]


@pytest.mark.parametrize("name", NAMES)
def test_golden_vectors(name):
    wanted = golden(name)
    model = load_pretrained(wanted.directory, device="cuda")
    ids = wanted.io["input_ids"].cuda()
    assert relative_to_max(model(ids).logits.cpu(), wanted.io["logits"]) < 2e-5
    loss = model.loss(ids, wanted.targets.cuda())
    loss.backward()
    torch.testing.assert_close(loss.cpu(), wanted.io["loss"][0], rtol=1e-5, atol=0)
    for parameter, gradient in model.named_logical_gradients().items():
        error = (gradient.cpu() - wanted.gradients[parameter]).norm() / wanted.gradients[parameter].norm()
        assert error < 1e-4, parameter
    half, decoded = ids.shape[1] // 2, []
    with torch.no_grad():
        out = model(ids[:, :half], return_state=True)
        decoded.append(out.logits)
        for at in range(half, ids.shape[1]):
            out = model(ids[:, at : at + 1], state=out.state, return_state=True)
            decoded.append(out.logits)
    assert relative_to_max(torch.cat(decoded, dim=1).cpu(), wanted.io["decode_logits"]) < 2e-5


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
def test_gradients_equal_one_fp64_process(world, tp):
    cases = [(engine, n, TINY.norm) for engine in (LOCAL, *ZERO) for n in (1, 3)]
    others = ("transformer", "layernorm", "hybrid", "cosformer", "transnormer_2022")
    cases += [(engine, 3, model) for engine in (LOCAL, ZERO[1], FSDP2) for model in others]
    check_gradients(world, tp, [*cases, (ZERO[1], 1, "rmsnorm"), (ZERO[3], 3, "rmsnorm")], device="cuda")


@TWO
@pytest.mark.parametrize("cut", [False, True], ids=["whole products", "products in chunks"])
def test_gradients_under_sequence_parallelism_equal_one_fp64_process(cut):
    recomputed = [dataclasses.replace(LOCAL, recompute=policy) for policy in ("selective", "full")]
    models = ((1, TINY.norm), (3, "rmsnorm"), (1, "transformer"), (1, "hybrid"), (1, "cosformer"))
    engines = [LOCAL, *recomputed] if cut else [LOCAL, *ZERO, ALL_PARTITIONED, FSDP2, *recomputed]
    cases = [(engine, n, model) for engine in engines for n, model in models]
    check_gradients(2, 2, cases, device="cuda", sequence_parallel=True, chunk_tokens=8 if cut else None)


@TWO
def test_gradients_of_context_parallel_slices_equal_one_fp64_process():
    recomputed = [dataclasses.replace(LOCAL, recompute=policy) for policy in ("selective", "full")]
    cases = [(engine, n, TINY.norm) for engine in (LOCAL, *ZERO, FSDP2) for n in (1, 3)]
    check_gradients(2, 1, cases, device="cuda", cp=2)
    others = [(engine, 1, model) for engine in recomputed for model in ("rmsnorm", "layernorm", "cosformer")]
    check_gradients(2, 1, others, device="cuda", cp=2)


@FOUR
@pytest.mark.parametrize(
    ("tp", "cp", "shared"),
    [(4, 1, True), (2, 2, True), (2, 2, False), (2, 1, True), (1, 4, False), (1, 2, False)],
    ids=str,
)
def test_gradients_of_products_of_layouts_equal_one_fp64_process(tp, cp, shared):
    cases = [(engine, n, norm) for engine in (LOCAL, *ZERO, FSDP2) for n, norm in ((1, TINY.norm), (3, "rmsnorm"))]
    check_gradients(4, tp, cases, device="cuda", cp=cp, sequence_parallel=shared)


@functools.cache
def losses_in_fp32() -> list[float]:
    return train(1, LOCAL, 10, TINY)["losses"]


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
def test_bf16_training_follows_fp32(world, tp):
    exact = losses_in_fp32()
    for sequence_parallel in (False, True) if tp > 1 else (False,):
        of_engines = run_shared(world, train_each, tp, ZERO_BF16, 10, TINY, sequence_parallel, device="cuda")[0]
        for name, found in of_engines.items():
            assert found["losses"] == pytest.approx(exact, rel=0.02), name
            assert found["losses"][-1] < found["losses"][0] - 0.1, name


@TWO
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence_parallel"])
def test_replicated_parameters_are_bit_equal_after_twenty_steps(sequence_parallel):
    ranks = run_shared(2, train, 2, ZERO_BF16[1], 20, RMSNORM, sequence_parallel, device="cuda")
    one, other = (replicated(found) for found in ranks)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def replicas_of_each(
    tp: int, cp: int, shared: bool, engines: list[EngineConfig]
) -> dict[str, dict[tuple[str, int], torch.Tensor]]:
    return {name_of(engine): replicated(train(tp, engine, 20, RMSNORM, shared, cp)) for engine in engines}


@FOUR
@pytest.mark.parametrize(("tp", "cp", "shared"), [(4, 1, True), (2, 2, True), (2, 2, False)], ids=str)
def test_replicated_parameters_are_bit_equal_in_products_of_layouts(tp, cp, shared):
    ranks = run_shared(4, replicas_of_each, tp, cp, shared, [LOCAL, *ZERO, FSDP2], device="cuda")
    for name in ranks[0]:
        assert_replicas_equal([found[name] for found in ranks], tp, RMSNORM.layers)


def products_of(cut: bool) -> list[torch.Tensor]:
    """Both products, forward and backward, in bf16, whole and under sequence parallelism, in one chunk or several."""
    with in_chunks(512 if cut else 1 << 30):
        return [x.float().cpu() for x in both_products(layout(2))]


def both_products(context: ParallelContext) -> list[torch.Tensor]:
    draw = torch.Generator("cuda").manual_seed(context.tp.rank)
    found = []
    for rows in (0, 4099):
        size = products.slice_length(rows, 2) if rows else 4099
        inputs = [(size, 512), (768, 512), (256, 512), (4099, 384), (512, 384)]
        leaves = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=draw).requires_grad_() for shape in inputs
        ]
        x, one, two, y, w = leaves
        beside = torch.rand(4099, device="cuda", generator=draw).requires_grad_()
        outs = products.column_products(x, [one, two], context.tp.name, rows)
        outs += products.row_product(y, w, context.tp.name, rows, beside)
        torch.autograd.backward(outs, [out.detach().sin() for out in outs])
        found += [x.detach() for x in outs] + [leaf.grad for leaf in (*leaves, beside)]
    torch.cuda.synchronize()
    return found


@TWO
def test_products_in_chunks_are_the_whole_ones():
    for cut, whole in zip(
        run_shared(2, products_of, True, device="cuda"), run_shared(2, products_of, False, device="cuda"), strict=True
    ):
        for one, other in zip(cut, whole, strict=True):
            assert (one - other).norm() < 2e-3 * other.norm()
