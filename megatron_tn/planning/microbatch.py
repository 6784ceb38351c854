"""What one microbatch takes of a rank: memory, matrix products, memory traffic and collectives.

The model's own code runs forward and backward on fake tensors (stand_ins.py), so recomputation, tensor, sequence and
context parallelism, and every token mixer are counted as they are. `microbatch` follows every layer; `extrapolated`
follows a few of equal layers, for searches: exact, but for a peak that is at most too high.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tn.config import TrainConfig
from megatron_tn.engine.base import DTYPES
from megatron_tn.model.base import Model
from megatron_tn.model.registry import build_model, norm_bound
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.parallel.float8_layers import float8_layers, kept_weights, layer_groups
from megatron_tn.parallel.recompute import recompute_blocks
from megatron_tn.planning.collectives import bytes_of, collectives_of
from megatron_tn.planning.live import BLOCK, LiveMemory
from megatron_tn.planning.stand_ins import stand_in_tensors, stand_in_world

Exchange = tuple[str, str]  # kind of collective, axis "tp" or "cp"


@dataclass(frozen=True)
class Microbatch:
    """kept, peak: bytes alive between forward and backward pass, and at most; parameters excluded.

    products: smallest dimension of a matrix product -> FLOPs of all such products, those of fp8 over FP8_RATE. moved:
    bytes that all other kernels read and write. exchanged: (kind, axis) -> (calls, bytes of the whole tensors).
    """

    kept: int
    peak: int
    products: Mapping[int, int]
    moved: int
    exchanged: Mapping[Exchange, tuple[int, int]]

    def plus(self, other: Microbatch, times: int) -> Microbatch:
        """self + times x other, kind by kind."""
        products = dict(self.products)
        for size, flops in other.products.items():
            products[size] = products.get(size, 0) + times * flops
        exchanged = dict(self.exchanged)
        for key, (calls, size) in other.exchanged.items():
            before = exchanged.get(key, (0, 0))
            exchanged[key] = (before[0] + times * calls, before[1] + times * size)
        kept, peak, moved = (getattr(self, name) + times * getattr(other, name) for name in ("kept", "peak", "moved"))
        return Microbatch(kept, peak, products, moved, exchanged)


def microbatch(config: TrainConfig, device: str = "cuda") -> Microbatch:
    """What one microbatch takes of a rank. device: "cuda" or "cpu", whose operators and allocator rounding are counted.
    Compiled blocks are counted as eager blocks: torch.compile keeps this project's custom operators, and saves the same
    tensors. Results are cached, since engines and data-parallel sizes run the same pass.

    Raises:
        ValueError: torch.distributed is already initialised in this process.
    """
    key = (same_pass(config), device)
    if key not in _measured:
        _measured[key] = _measure(config, device)
    return _measured[key]


def same_pass(config: TrainConfig) -> tuple:
    """What the passes of a microbatch depend on: equal for engines that run the same ones."""
    engine, data = config.engine, config.data
    recompute = engine.recompute, engine.recompute_every
    products = engine.precision, engine.products, engine.keeps_weights
    return repr(config.model), config.parallel, recompute, products, data.micro_batch, data.sequence_length


def extrapolated(config: TrainConfig) -> Microbatch:
    """`microbatch` from runs of a few layers where all layers after the first are alike, else `microbatch`."""
    model, every = config.model, config.engine.recompute_every
    fewer = 1 + (model.layers - 1) % every
    alike = len(set(zip(model.mixers[1:], model.lrpe_layers[1:], strict=True))) == 1
    if model.layers <= fewer + every or not alike:
        return microbatch(config)
    few, more = (microbatch(replace(config, model=model.shortened(layers))) for layers in (fewer, fewer + every))
    return _continued(few, more, (model.layers - fewer) // every)


def extrapolated_in_rows(config: TrainConfig) -> Microbatch:
    """`extrapolated`; a microbatch of more than 2 x FULL_RATE tokens from two smaller ones, of powers of two."""
    data = config.data
    fewer = 1
    while fewer * data.sequence_length < FULL_RATE * config.parallel.cp:
        fewer *= 2
    if data.micro_batch <= 2 * fewer:
        return extrapolated(config)
    few, more = (extrapolated(replace(config, data=replace(data, micro_batch=rows))) for rows in (fewer, 2 * fewer))
    rest = data.micro_batch - fewer
    return _continued(few, more, rest // fewer) if rest % fewer == 0 else extrapolated(config)


FULL_RATE = 8192  # tokens of a rank from which on more do not make the head's chunks of tokens, and so its rate, larger


def _continued(one: Microbatch, two: Microbatch, times: int) -> Microbatch:
    """one + times x (two - one), by linear extrapolation. A small pass may have its peak in the embedding's gradient,
    which does not grow with layers; so the peak is at least the kept bytes plus two.peak - two.kept."""
    found = one.plus(two.plus(one, -1), times)
    return replace(found, peak=max(found.peak, found.kept + two.peak - two.kept))


_measured: dict[tuple, Microbatch] = {}


def _measure(config: TrainConfig, device: str) -> Microbatch:
    rules = (BLOCK, WORKSPACE) if device == "cuda" else ()
    with stand_in_world(config.parallel) as context, stand_in_tensors(device), LiveMemory(*rules) as memory:
        model = step_model(config, context)
        for parameter in model.parameters():
            # Engines free parameter.grad once it is computed and added to their gradient sum.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        tokens = torch.zeros(config.data.micro_batch, config.data.sequence_length, dtype=torch.int64)
        before = memory.current
        with Work({context.tp.name: "tp", context.cp.name: "cp"}) as work:
            loss = model(tokens, targets=tokens, reduction="sum").loss
            kept = memory.current - before
            loss.backward()
        peak = memory.peak - before
    return Microbatch(kept, peak, dict(work.products), work.moved, dict(work.exchanged))


def step_model(config: TrainConfig, context: ParallelContext) -> Model:
    """This rank's model in the computing type, with recomputation, as in `engine.build`."""
    model = build_model(config.model, context, "cpu", DTYPES[config.engine.precision])
    if config.engine.products == "fp8":
        layers = float8_layers(model.blocks, norm_bound(config.model))
        if config.engine.keeps_weights:
            kept_weights(layer_groups(layers), transposed=config.engine.keeps_fp8_transposes)
    recompute_blocks(model.blocks, config.engine.recompute, config.engine.recompute_every)
    return model


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class Work(TorchDispatchMode):
    """Context manager: counts FLOPs of matrix products, bytes moved by other kernels, and collectives.

    axes: name of a process group -> its axis.
    """

    def __init__(self, axes: Mapping[str, str]):
        super().__init__()
        self.axes = axes
        self.products: collections.Counter[int] = collections.Counter()
        self.moved = 0
        self.exchanged: dict[Exchange, tuple[int, int]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for call in collectives_of(operator, args, kwargs or {}):
            key = call.kind, self.axes[call.group]
            calls, size = self.exchanged.get(key, (0, 0))
            self.exchanged[key] = calls + 1, size + call.size
        name = str(operator).rpartition(".")[0]
        if name in PRODUCTS:
            faster = FP8_RATE if name in FP8_PRODUCTS else 1
            for m, n, k in PRODUCTS[name](*args):
                self.products[min(m, n, k)] += int(2 * m * n * k / faster)
        elif not name.startswith(("prim.", "c10d.", "_c10d_functional.")):
            self.moved += int(_moved(name, operator, args, out))
        return out


def _mm(a: Tensor, b: Tensor, *rest: object) -> list[Product]:
    return [(a.shape[-2] * a.shape[:-2].numel(), b.shape[-1], a.shape[-1])]


def _rows(weights: Sequence[Tensor], rows: int) -> list[Product]:
    return [(rows, *weight.shape) for weight in weights]


def _attention(q: Tensor, products: int) -> list[Product]:
    """Causal softmax attention, q [B, H, N, d]: half of each N x N x d product. Counted as a product whose smallest
    dimension is 512, of whose rate cuDNN's kernels are on an H200 (docs/performance.md: 14.3 ms at N 8192)."""
    return [(q.numel() * q.shape[-2] // (2 * 512 * 512), 512, 512)] * products


Product = tuple[int, int, int]  # [m, k] times [k, n]: m, n, k, of 2 m n k FLOPs

# Operator -> function of its arguments: the matrix products it makes. weight [out, in].
PRODUCTS: dict[str, Callable[..., list[Product]]] = {
    "aten.mm": _mm,
    "aten.bmm": _mm,
    "aten.addmm": lambda total, a, b, *rest: _mm(a, b),
    "megatron_tn.column_forward": lambda x, weights, group, rows: _rows(weights, rows or x.shape[0]),
    "megatron_tn.row_forward": lambda x, weight, *rest: _rows([weight], x.shape[0]),
    "megatron_tn.row_backward": lambda gradient, beside, weight, group, rows: _rows([weight], rows),
    "aten._scaled_mm": _mm,
    "megatron_tn.column_forward_fp8": lambda x, scale, weight, weight_scale, width, group, rows, dtype: _rows(
        [weight], rows or x.shape[0]
    ),
    "megatron_tn.row_forward_fp8": lambda x, scale, weight, *rest: _rows([weight], x.shape[0]),
    "megatron_tn.row_backward_fp8": lambda gradient, scale, beside, weight, weight_scale, width, group, rows, dtype: (
        _rows([weight], rows)
    ),
    "aten._scaled_dot_product_flash_attention_for_cpu": lambda q, *rest: _attention(q, 2),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": lambda dy, q, *rest: _attention(q, 5),
    "megatron_tn.head_exponentials": lambda hidden, weight, *rest: _rows([weight], hidden.shape[0]),
}

FP8_PRODUCTS = [name for name in PRODUCTS if name.endswith(("_fp8", "_scaled_mm"))]
FP8_RATE = 1.84  # times bf16's rate: products of 1B's and 7B's blocks, H200: 120.2 / 65.0 and 904 / 493 ms

# Kernels that move more than each input and output once: factor. Attention's backward pass takes its operands in two
# scans: 0.75 ms for 0.44 ms of bytes (docs/performance.md, lightning_attention at N 8192).
REREADS = {"megatron_tn.gla_backward": 1.7, "megatron_tn.gla_slice_backward": 1.7}
FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh", "aten.empty_like")


def _moved(name: str, operator: torch._ops.OpOverload, args: tuple, out: object) -> float:
    """Bytes of an operator's inputs and outputs, each once; 0 for views and for allocations."""
    if name in FREE or operator.is_view or name == "aten._unsafe_view":
        return 0
    outputs = list(_tensors(out))
    if name == "megatron_tn.scaled_embedding":  # reads the rows of its tokens alone
        return 2 * sum(map(bytes_of, outputs))
    read = {id(x): bytes_of(x) for x in _tensors(args)}
    return REREADS.get(name, 1) * (sum(read.values()) + sum(map(bytes_of, outputs)))


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _gla_gradients_bytes(qkvu: Tensor, theta: Tensor | None) -> int:
    """Bytes of do [tokens, D], and with LRPE of the gradients of the features of q and k, [tokens, 2 D] each
    (kernels/gla/passes.py)."""
    part = qkvu.numel() // 4 * qkvu.element_size()
    return part if theta is None else 5 * part


def _rows_bytes(x: Tensor, rows: int) -> int:
    """Bytes of a tensor [rows, D] of the type of x [.., D]."""
    return rows * x.shape[-1] * x.element_size()


# Operator -> function of its arguments: bytes allocated and freed within one call. The column- and row-parallel
# products of sequence parallelism gather tokens, or reduce-scatter sums, within one operator.
WORKSPACE = {
    "megatron_tn.gla_backward.default": lambda dy, dsquare_sum, dstate, o, qkvu, decay, theta, *rest: (
        _gla_gradients_bytes(qkvu, theta)
    ),
    "megatron_tn.gla_slice_backward.default": lambda dy, dsquare_sum, o, qkvu, decay, theta, *rest: (
        _gla_gradients_bytes(qkvu, theta)
    ),
    # The name of softmax attention's backward pass on the plan's tensors; a GPU's kernels sum dq in fp32.
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": lambda dy, q, *rest, **options: 4 * q.numel(),
    "megatron_tn.column_forward.default": lambda x, weights, group, rows: _rows_bytes(x, rows),
    "megatron_tn.row_forward.default": lambda x, weight, group, rows, beside=None: (
        rows * weight.shape[0] * x.element_size()
    ),
    "megatron_tn.column_forward_fp8.default": lambda x, scale, weight, weight_scale, width, group, rows, dtype: (
        _rows_bytes(x, rows)
    ),
    "megatron_tn.row_forward_fp8.default": lambda x, scale, weight, weight_scale, width, group, rows, dtype, *beside: (
        rows * width * dtype.itemsize
    ),
}
