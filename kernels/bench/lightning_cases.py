"""The benchmark's cases of lightning attention, gated linear attention, and one token of decoding."""

from collections.abc import Iterator

import torch
from torch import Tensor

import kernels
from kernels.bench.cases import Case, random_inputs
from kernels.bench.peers import attention_peers, packed_peers

PACKED = ", packed documents"


def cases(device: torch.device) -> Iterator[tuple[Case, Case]]:
    """As `kernels.bench.cases.cases`."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    heads, width = (32, 128) if gpu else (4, 64)
    sizes = (heads, width, dtype, device)
    for length in (1024, 2048, 8192, 32768, 131072) if gpu else (512,):
        batch = max(32768 // length, 1) if gpu else 8
        yield _attention(1, 321, *sizes), _attention(batch, length, *sizes)
    if gpu:
        yield _attention(1, 321, 8, width, dtype, device), _attention(1, 131072, 8, width, dtype, device)
    tokens = 32768 if gpu else 512
    for documents in (1, 2, 32, 256) if gpu else (2, 16):
        yield _attention(1, 321, *sizes, documents=9), _attention(1, tokens, *sizes, documents=documents)
    equal = 32 if gpu else 4
    yield (
        _attention(1, 321, *sizes, documents=3, even=True),
        _attention(1, tokens, *sizes, documents=equal, even=True),
    )
    for length in (1024, 32768) if gpu else (256,):
        batch = max(32768 // length, 1) if gpu else 4
        for with_lrpe in (False, True):
            yield _mixer(1, 321, with_lrpe, *sizes), _mixer(batch, length, with_lrpe, *sizes)
    for with_lrpe in (False, True):
        yield _mixer(1, 321, with_lrpe, *sizes, documents=9), _mixer(1, tokens, with_lrpe, *sizes, documents=32)
    for with_lrpe in (False, True):
        for batch in (1, 16, 256) if gpu else (4,):
            yield _step(3, with_lrpe, *sizes), _step(batch, with_lrpe, *sizes)


def _attention(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device,
    documents: int = 0, even: bool = False,
) -> Case:  # fmt: skip
    """documents: number of documents packed into one row; their states are not counted as memory traffic."""
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    cu_seqlens = _cuts(documents, length, device, even) if documents else None

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.lightning_attention(q, k, v, decay, cu_seqlens=cu_seqlens)

    peers = packed_peers(cu_seqlens, decay, device) if documents else attention_peers(length, decay, device)
    return Case(
        "lightning_attention" + (PACKED if documents else ""),
        f"{_rows(batch, length, documents, even)} H {heads} d {width}",
        function,
        random_inputs(3, batch, length, heads, width, dtype=dtype, device=device),
        [random_inputs(1, batch, length, heads, width, dtype=dtype, device=device)[0].detach()],
        function,  # fp64 inputs run in plain PyTorch
        peers=peers,
        length=length if heads > 8 and not documents else None,
    )


def _rows(batch: int, length: int, documents: int, even: bool = False) -> str:
    if not documents:
        return f"B {batch} N {length}"
    return f"{documents} of {'equal' if even else 'any'} length in {length}"


def _cuts(documents: int, tokens: int, device: torch.device, even: bool = False) -> Tensor:
    """cu_seqlens int64 [documents + 1], the same in every run, without empty documents."""
    if even:
        return torch.arange(0, tokens + 1, tokens // documents, device=device)
    draw = torch.Generator().manual_seed(documents)
    ends = torch.randperm(tokens - 1, generator=draw)[: documents - 1].sort().values + 1
    return torch.cat([torch.tensor([0]), ends, torch.tensor([tokens])]).to(device)


def _theta(heads: int, width: int, device: torch.device) -> Tensor:
    return (10000.0 ** (-torch.arange(heads * width, device=device) / (heads * width))).view(heads, 1, width)


def _mixer(
    batch: int, length: int, with_lrpe: bool, heads: int, width: int, dtype: torch.dtype, device: torch.device,
    documents: int = 0,
) -> Case:  # fmt: skip
    """Lower bound: one kernel per pass. Forward reads qkvu and writes y; backward reads qkvu and dy and writes dqkvu.
    The time includes dtheta, which self_check compares with fp64."""
    cu_seqlens = _cuts(documents, length, device) if documents else None
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    theta = _theta(heads, width, device).requires_grad_()

    def function(qkvu: Tensor) -> Tensor:
        return kernels.gla(qkvu, decay, theta if with_lrpe else None, act="silu", cu_seqlens=cu_seqlens)[0]

    return Case(
        f"gla{', LRPE' if with_lrpe else ''}{PACKED if documents else ''}",
        f"{_rows(batch, length, documents)} H {heads} d {width}",
        function,
        random_inputs(1, batch, length, 4 * heads * width, dtype=dtype, device=device),
        [torch.randn(batch, length, heads * width, dtype=dtype, device=device)],
        function,
    )


def _step(batch: int, with_lrpe: bool, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """One decoding step, which reads and writes the fp32 state."""
    decay = torch.logspace(-8, 0, heads, base=2, device=device)
    theta = _theta(heads, width, device) if with_lrpe else None
    positions = torch.tensor([1000], device=device)

    def function(qkvu: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y, _, state = kernels.gla(
                qkvu, decay, theta, act="silu", positions=positions, initial_state=state, return_state=True
            )
        return y, state

    qkvu = torch.randn(batch, 1, 4 * heads * width, dtype=dtype, device=device)
    state = torch.randn(batch, heads, 2 * width if with_lrpe else width, width, device=device)
    return Case(
        f"gla, one token{', LRPE' if with_lrpe else ''}",
        f"B {batch} H {heads} d {width}",
        function,
        [qkvu, state],
        [],
        function,
        output_bytes=qkvu.nbytes // 4 + state.nbytes,
    )
