"""One step of a world that does not exist: the true model and engine on fake tensors, as several of its ranks in turn.

Every rank's collectives are recorded, with their groups, sizes and types, and compared between the ranks that meet in
them: a difference would hang or corrupt the run. torch's "fake" process group returns from collectives at once, so one
process can be any rank of any world.

The local engine and FSDP2 run as they are, the update included. DeepSpeed reads values that fake tensors lack: its
model runs, and its exchanges follow from `engine_exchanges`, which tests compare with recorded runs.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_tn.config import TrainConfig
from megatron_tn.engine import fsdp2
from megatron_tn.engine.build import build_engine
from megatron_tn.model.registry import parameter_count
from megatron_tn.parallel import float8_operators, products
from megatron_tn.parallel.context import ParallelContext
from megatron_tn.planning.collectives import Call, Collective, CollectiveLog, bytes_of
from megatron_tn.planning.microbatch import same_pass, step_model
from megatron_tn.planning.stand_ins import stand_in_tensors, stand_in_world
from megatron_tn.planning.traffic import engine_exchanges


def dry_run(config: TrainConfig, world_size: int) -> tuple[dict[int, list[Call]], list[str]]:
    """Rank -> its collectives in a step of one microbatch; and one line for each difference between ranks."""
    logs, problems = {}, []
    for rank in meeting_ranks(config, world_size):
        logs[rank], wrong = run_as(config, world_size, rank)
        problems += wrong
    return logs, problems + differences(logs)


def meeting_ranks(config: TrainConfig, world_size: int) -> list[int]:
    """Rank 0, inner ranks and the last one: each meets the one before it in the group of one axis."""
    tp, cp = config.parallel.tp, config.parallel.cp
    return sorted({0, tp - 1, tp * cp - 1, world_size - 1})


def run_as(config: TrainConfig, world_size: int, rank: int) -> tuple[list[Call], list[str]]:
    """The collectives of `rank`; and one line for each whose parts do not make up the whole tensor, and for an error.
    DeepSpeed's stages run one model: its recording is kept.

    Raises:
        ValueError: torch.distributed is already initialised in this process.
    """
    with stand_in_world(config.parallel, rank, world_size) as context:
        if config.engine.name != "deepspeed":
            return _record(config, context, rank)
        key = (same_pass(config), world_size, rank)
        if key not in _recorded:
            _recorded[key] = _record(config, context, rank)
        calls, problems = _recorded[key]
        return [*calls, *(_formulas(config, context) if context.data.size > 1 else ())], problems


_recorded: dict[tuple, tuple[list[Call], list[str]]] = {}


def _record(config: TrainConfig, context: ParallelContext, rank: int) -> tuple[list[Call], list[str]]:
    with stand_in_tensors("cpu"), _real_meshes(), _RankLog(rank) as log:
        try:
            _step(config, context)
        except (RuntimeError, ValueError, AssertionError) as error:
            log.problems.append(f"rank {rank} fails: {str(error).splitlines()[0]}")
    return [_named(call) for call in log.calls], log.problems


def _step(config: TrainConfig, context: ParallelContext) -> None:
    tokens = torch.zeros(config.data.micro_batch, config.data.sequence_length, dtype=torch.int64)
    if config.engine.name == "deepspeed":
        step_model(config, context)(tokens, targets=tokens, reduction="sum").loss.backward()
        return
    engine = build_engine(config, context, torch.device("cpu"))
    engine.forward_backward(tokens, tokens, None, scale=torch.ones(()), last=True)
    engine.step(1e-4)


def _named(call: Collective) -> Call:
    group = dist.distributed_c10d._resolve_process_group(call.group)
    return Call(call.kind, tuple(dist.get_process_group_ranks(group)), call.size, call.dtype)


def _formulas(config: TrainConfig, context: ParallelContext) -> Iterator[Call]:
    members = tuple(dist.get_process_group_ranks(context.data.group))
    local = math.ceil(parameter_count(config.model) / config.parallel.tp)
    for name, kind, width, times, _ in engine_exchanges(config, 1):
        yield Call(kind, members, width * local * times, f"{8 * width}-bit {name}")


class _RankLog(CollectiveLog):
    """Records the collectives within the products of parallel/products.py by running their code; and stands in for the
    values that a step reads, since fake tensors have none."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.problems: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if (code := CODE.get(str(operator))) is not None:
            with self:
                return code(*args, **(kwargs or {}))
        self._check_parts(str(operator), args)
        return super().__torch_dispatch__(operator, types, args, kwargs)

    def _check_parts(self, name: str, args: tuple) -> None:
        if name not in ("c10d._allgather_base_.default", "c10d._reduce_scatter_base_.default"):
            return
        whole, part = args[:2] if "allgather" in name else (args[1], args[0])
        ranks = dist.ProcessGroup.unbox(args[2]).size()
        if bytes_of(whole) != ranks * bytes_of(part):
            self.problems.append(
                f"rank {self.rank}: {name.split('.')[1]} over {ranks} ranks has parts of {bytes_of(part):,} bytes and "
                f"a whole of {bytes_of(whole):,}"
            )


# Operator -> its own code, which makes collectives; other operators have a rule for fake tensors alone.
CODE: dict[str, Callable[..., Tensor]] = {
    "megatron_tn.column_forward.default": products._column_forward._init_fn,
    "megatron_tn.row_forward.default": products._row_forward._init_fn,
    "megatron_tn.row_backward.default": products._row_backward._init_fn,
    "megatron_tn.column_forward_fp8.default": float8_operators.column_forward._init_fn,
    "megatron_tn.row_forward_fp8.default": float8_operators.row_forward._init_fn,
    "megatron_tn.row_backward_fp8.default": float8_operators.row_backward._init_fn,
}


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """FSDP2's DeviceMesh reads its own tensor of ranks, which must not be fake."""
    make = fsdp2._mesh

    def mesh(*args: object) -> object:
        with unset_fake_temporarily():
            return make(*args)

    fsdp2._mesh = mesh
    try:
        yield
    finally:
        fsdp2._mesh = make


def differences(logs: dict[int, Sequence[Call]]) -> list[str]:
    """One line for each pair of ranks whose collectives differ: first those over groups that both are in, call by call,
    and where these agree the order of all."""
    found = []
    for (one, calls), (other, others) in itertools.combinations(logs.items(), 2):
        common = [[call for call in log if {one, other} <= set(call.ranks)] for log in (calls, others)]
        orders = [[call.shape for call in log] for log in (calls, others)]
        for left, right in (common, orders):
            if (at := _first_difference(left, right)) is not None:
                left, right = (log[at] if at < len(log) else "none" for log in (left, right))
                found.append(f"collective {at} of ranks {one} and {other}: {left} on {one}, {right} on {other}")
                break
    return found


def _first_difference(left: Sequence, right: Sequence) -> int | None:
    for at, (a, b) in enumerate(itertools.zip_longest(left, right)):
        if a != b:
            return at
    return None
