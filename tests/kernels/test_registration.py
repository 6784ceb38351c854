"""What PyTorch's own machinery sees of the operators: opcheck, torch.compile, fake tensors and the FLOP counter."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def operators():
    ops = torch.ops.megatron_tn
    q, k, v = leaf(1, 9, 2, 4), leaf(1, 9, 2, 4), leaf(1, 9, 2, 6)
    decay, state, packed = torch.tensor([0.0, 0.5]), leaf(1, 2, 4, 6), leaf(3, 2, 4, 6)
    bounds = torch.tensor([0, 4, 9, 9], dtype=torch.int32)
    x, y, s = leaf(2, 9, 8), leaf(2, 9, 8), leaf(2, 9).square().detach().requires_grad_()
    targets = torch.tensor([0, 3, -100])
    return {
        "lightning_forward": (ops.lightning_forward, (q, k, v, decay, None, None, False)),
        "lightning_forward+state": (ops.lightning_forward, (q, k, v, decay, state, None, True)),
        "lightning_forward+packed": (ops.lightning_forward, (q, k, v, decay, packed, bounds, True)),
        "lightning_backward": (
            ops.lightning_backward,
            tuple(None if a is None else a.detach() for a in (v, state, q, k, v, decay, state, None, None)),
        ),
        **gla_operators(decay, bounds),
        "srmsnorm_forward": (ops.srmsnorm_forward, (x, 1e-6)),
        "srmsnorm_backward": (ops.srmsnorm_backward, (None, y.detach(), x.detach(), 1e-6)),
        "srmsnorm_backward+branch": (ops.srmsnorm_backward, (*(a.detach() for a in (y, y, x)), 1e-6, True)),
        "add_srmsnorm_forward": (ops.add_srmsnorm_forward, (x, y, None, 1e-6)),
        "add_srmsnorm_forward+scaled": (ops.add_srmsnorm_forward, (x, y, s, 1e-6)),
        "add_scaled_srmsnorm_backward": (
            ops.add_scaled_srmsnorm_backward,
            (*(a.detach() for a in (y, y, x, y, s)), 1e-6, True),
        ),
        "rmsnorm_forward": (ops.rmsnorm_forward, (x, leaf(8), 1e-6)),
        "add_rmsnorm_forward": (ops.add_rmsnorm_forward, (x, y, leaf(8), 1e-6)),
        "rmsnorm_backward": (ops.rmsnorm_backward, (None, y.detach(), x.detach(), torch.randn(8), 1e-6)),
        "rope": (ops.rope, (x, y, torch.arange(9), 4, 100.0, False)),
        "sglu_forward": (ops.sglu_forward, (x, y, "silu")),
        "sglu_forward+views": (ops.sglu_forward, (x.transpose(0, 1), y.transpose(0, 1), "none")),
        "sglu_backward": (ops.sglu_backward, (*(a.detach() for a in (y, x, y)), "none")),
        "sglu_pair_forward": (ops.sglu_pair_forward, (x.detach()[0], "silu")),
        "sglu_pair_backward": (ops.sglu_pair_backward, (y.detach()[0, :, :4], x.detach()[0], "silu")),
        "token_linear": (ops.token_linear, (x.detach()[0, 0], y.detach()[0], None, 1e-6, s.detach()[0], None)),
        "token_glu": (ops.token_glu, (x.detach()[0, 0], *y.detach(), None, None, 1e-6, "silu")),
        # Bytes in the place of fp8: opcheck multiplies inputs, which a CPU cannot in fp8.
        "float8_linear": (ops.float8_linear, (x.detach()[0], torch.ones(3, 8, dtype=torch.uint8), torch.ones(3))),
        "sample_tokens": (
            ops.sample_tokens,
            (
                torch.randn(2, 9),
                *(torch.tensor([1, 2]),) * 2,
                torch.ones(2).double(),
                torch.tensor([0, 3]),
                torch.ones(2).double(),
                torch.ones(2),
                torch.zeros(2, 9, dtype=torch.bool),
                4,
                False,
            ),
        ),
        "scaled_embedding": (ops.scaled_embedding, (targets.clamp(min=0), leaf(5, 4), 2.0, 1, 6)),
        "scaled_embedding_backward": (
            ops.scaled_embedding_backward,
            (torch.randn(3, 4), targets.clamp(min=0), 5, 2.0, 1),
        ),
        "add_embedding_gradient_": (
            ops.add_embedding_gradient_,
            (torch.zeros(5, 4), torch.randn(3, 4), targets.clamp(min=0), 2.0, 1),
        ),
        "local_targets": (ops.local_targets, (targets, -100, 2, 4, 6)),
        "largest": (ops.largest, (x.detach(),)),
        "quantize": (
            ops.quantize,
            (x.detach()[0], torch.tensor([2**30 + 2**24], dtype=torch.int32), torch.float8_e5m2, True, False),
        ),
        "transpose_fp8": (ops.transpose_fp8, (torch.zeros(3, 16, dtype=torch.uint8),)),
        **head_operators(),
    }


def head_operators():
    """The steps of the cross-entropy, called under no autograd of their own."""
    ops = torch.ops.megatron_tn
    hidden, weight, exponentials = torch.randn(3, 4), torch.randn(5, 4), torch.rand(3, 5)
    rows, kept = torch.tensor([0, 3, -1]), torch.tensor([True, True, False])
    a, b, c = torch.randn(3, 3).unbind()
    return {
        "head_exponentials": (ops.head_exponentials, (hidden, weight, rows, 4)),
        "head_scaled": (ops.head_scaled, (hidden, a[0], b, torch.bfloat16)),
        "head_totals_": (ops.head_totals_, (exponentials, a, b, hidden, weight, c, 4)),
        "head_gradient_": (ops.head_gradient_, (exponentials, torch.empty(3, 4), hidden, rows, kept, a, b, c)),
    }


def gla_operators(decay, bounds):
    ops = torch.ops.megatron_tn
    qkvu, theta, positions = leaf(1, 9, 32), leaf(2, 1, 4), torch.arange(9)
    state, narrow = leaf(3, 2, 8, 4), leaf(1, 2, 4, 4)
    y, o, sums = torch.randn(1, 9, 8), torch.randn(1, 9, 2, 4), torch.rand(1, 9)

    def plain(*arguments):
        return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)

    return {
        "gla_features": (ops.gla_features, plain(qkvu, theta, "silu", positions, 2)),
        "gla_forward": (ops.gla_forward, (qkvu, None, decay, None, "silu", True, None, None, None, False, True)),
        "gla_forward+lrpe": (
            ops.gla_forward,
            (qkvu, None, decay, theta, "silu", False, positions, state, bounds, True),
        ),
        "gla_backward": (
            ops.gla_backward,
            plain(y, None, None, o, qkvu, decay, None, "none", True, None, narrow, None, None, None, None, False, True),
        ),
        "gla_backward+lrpe": (
            ops.gla_backward,
            plain(
                y, sums, state, o, qkvu, decay, theta, "silu", True, positions, state, bounds, None, None, state, True
            ),
        ),
        "gla_step": (ops.gla_step, plain(qkvu[:, :1], narrow, decay, None, "silu", True, positions[:1])),
        "gla_step_": (ops.gla_step_, plain(qkvu[:, :1], narrow, decay, None, "silu", True, positions[:1])),
        "gla_step+wide_state": (
            ops.gla_step,
            plain(qkvu[:, :1], narrow.double(), decay, None, "silu", True, positions[:1]),
        ),
        "gla_query_features_": (
            ops.gla_query_features_,
            plain(torch.empty(0), qkvu, theta, "silu", positions),
        ),
        "gla_state": (ops.gla_state, plain(qkvu, None, decay, theta, "silu", positions, state, bounds)),
    }


@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    torch.library.opcheck(*operators()[name])


def block(x, theta, decay, weight, targets):
    """Every operator once, as a layer and a loss would use them."""
    batch, total, width = x.shape
    qkv = kernels.simple_rms_norm(x).view(batch, total, 2, width // 2).repeat(1, 1, 1, 3)
    y = kernels.lightning_attention(*qkv.chunk(3, dim=-1), decay).flatten(2)
    fused = y.repeat(1, 1, 4)
    state = kernels.gla(fused, decay, theta, act="silu", return_state=True)[2]
    y, square_sum, _ = kernels.gla(fused, decay, theta, act="silu", initial_state=state)
    x, y = kernels.add_scaled_simple_rms_norm(*kernels.branch_simple_rms_norm(x)[:1], y, square_sum)
    x, y = kernels.add_simple_rms_norm(*kernels.branch_simple_rms_norm(kernels.sglu(x, y)))
    y = kernels.sglu(x, y)
    return kernels.linear_cross_entropy(y.flatten(0, 1), weight, targets)[0]


def block_inputs():
    torch.manual_seed(0)
    return leaf(2, 9, 8), leaf(2, 1, 4), torch.tensor([0.1, 0.5]), leaf(11, 8), torch.randint(0, 11, (18,))


# Inductor alone lowers operators, and on a CPU it needs a C++ compiler.
INDUCTOR = [pytest.mark.full, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_compile_without_a_graph_break(backend):
    torch._dynamo.reset()
    x, theta, decay, weight, targets = block_inputs()
    eager = block(x, theta, decay, weight, targets)
    compiled = torch.compile(block, fullgraph=True, backend=backend)(x, theta, decay, weight, targets)
    torch.testing.assert_close(compiled, eager)
    for got, expected in zip(
        torch.autograd.grad(compiled, (x, theta, weight)), torch.autograd.grad(eager, (x, theta, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_no_operator_of_a_pass_writes_to_an_optional_argument():
    """Inductor cannot lower one with a single result: "getitem is not an OpOverload"."""
    schemas = [each for each in torch._C._jit_get_all_schemas() if each.name.startswith("megatron_tn::")]
    passes = [each for each in schemas if each.name.endswith(("_forward", "_backward"))]
    assert len(passes) > 10
    for schema in passes:
        written = [each for each in schema.arguments if each.alias_info and each.alias_info.is_write]
        assert not any(isinstance(each.type, torch.OptionalType) for each in written), schema


def test_autocast_changes_nothing():
    """It reaches into operators, and would make bf16 of their fp32 products and states."""

    def run(enabled):
        x, theta, decay, weight, targets = block_inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = block(x, theta, decay, weight, targets)
            return loss, *torch.autograd.grad(loss, (x, theta, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_fake_tensors_run_a_block():
    with FakeTensorMode() as mode:
        x, theta, decay, weight, targets = (mode.from_tensor(t) for t in block_inputs())
        x, theta, weight = (t.detach().requires_grad_() for t in (x, theta, weight))
        block(x, theta, decay, weight, targets).backward()
        assert (x.grad.shape, theta.grad.shape, weight.grad.shape) == (x.shape, theta.shape, weight.shape)


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("total", [5, 200])
def test_lightning_flops(total):
    """Forward: k_t^T v_t and q_t S, 2 K V each; backward twice that. No chunk size enters."""
    q, k, v = leaf(3, total, 2, 8), leaf(3, total, 2, 8), leaf(3, total, 2, 16)
    forward = 3 * total * 2 * (2 * 8 * 16 + 2 * 8 * 16)
    decay = torch.zeros(2)
    assert flops(lambda: kernels.lightning_attention(q, k, v, decay)) == forward
    assert flops(lambda: kernels.lightning_attention(q, k, v, decay).sum().backward()) == 3 * forward


@pytest.mark.parametrize("with_lrpe", [False, True])
def test_gla_flops(with_lrpe):
    """Those of lightning attention at the features' width."""
    qkvu, theta = leaf(3, 20, 4 * 2 * 8), leaf(2, 1, 8) if with_lrpe else None
    forward = 4 * 3 * 20 * 2 * 8 * 8 * (2 if with_lrpe else 1)
    assert flops(lambda: kernels.gla(qkvu, torch.zeros(2), theta, act="silu")) == forward
    assert flops(lambda: kernels.gla(qkvu, torch.zeros(2), theta, act="silu")[0].sum().backward()) == 3 * forward
    state = torch.ops.megatron_tn.gla_state
    assert flops(lambda: state(qkvu.detach(), None, torch.zeros(2), theta, "silu", None, None, None)) == forward // 2


def test_cross_entropy_flops():
    """One product forward, two for the gradients, whatever the chunk; none of them when no gradient is wanted."""
    hidden, weight, targets = leaf(30, 8), leaf(50, 8), torch.zeros(30, dtype=torch.int64)
    product = 2 * 30 * 8 * 50
    assert flops(lambda: kernels.linear_cross_entropy(hidden, weight, targets, chunk_tokens=7)) == 3 * product
    with torch.no_grad():
        assert flops(lambda: kernels.linear_cross_entropy(hidden, weight, targets)) == product
