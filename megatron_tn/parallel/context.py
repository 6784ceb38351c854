"""The process layout of a run, passed as an argument, never a global.

    rank = (dp_rank * cp + cp_rank) * tp + tp_rank

Tensor-parallel ranks, which communicate most, are consecutive, so that they share a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

_alone: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Axis:
    """One dimension of the layout: this process's rank in the group of ranks that differ only in this dimension.

    group: None where size is 1.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @property
    def name(self) -> str:
        """The group's name, "" without a group. Registered operators take it, as a group cannot be their argument."""
        return "" if self.group is None else self.group.group_name

    def with_group(self) -> Axis:
        """The same for a library that needs a group: of size 1, the group of this rank alone, one for all callers. Each
        group has a thread of gloo's, which wakes ninety times a second."""
        global _alone
        if self.group is not None:
            return self
        if _alone not in dist.distributed_c10d._world.pg_map:  # none yet, or of a world that was left
            _alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return Axis(_alone)


@dataclass(frozen=True)
class ParallelContext:
    """Data, context and tensor parallelism.

    data: dp x cp, the ranks with the same parameters and different tokens.
    sequence_parallel: between split layers each tensor-parallel rank computes only a slice of the tokens.
    """

    dp: Axis = field(default_factory=Axis)
    cp: Axis = field(default_factory=Axis)
    tp: Axis = field(default_factory=Axis)
    data: Axis = field(default_factory=Axis)
    sequence_parallel: bool = False

    @classmethod
    def create(cls, tp: int = 1, cp: int = 1, *, sequence_parallel: bool = False) -> ParallelContext:
        """Lay out the default process group as dp x cp x tp; without an initialised one, a context of one process.

        Collective: every rank calls this with the same sizes.

        Raises:
            ValueError: the world size is not a multiple of tp x cp; sequence_parallel with tp=1.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if tp < 1 or cp < 1 or world % (tp * cp):
            raise ValueError(f"world size {world} is not a multiple of tp={tp} x cp={cp} = {tp * cp}")
        if sequence_parallel and tp == 1:
            raise ValueError("sequence_parallel=True shares tokens out over tensor-parallel ranks, but tp=1")
        if not dist.is_initialized():
            return cls()
        dp = world // (tp * cp)
        rank = dist.get_rank()
        dp_rank, cp_rank, tp_rank = rank // (cp * tp), rank // tp % cp, rank % tp

        def axis(*ranks: int) -> Axis:
            if len(ranks) == 1:
                return Axis()
            # The members of a group alone create it: at most four groups a rank, however many ranks there are.
            group = dist.new_group(list(ranks), use_local_synchronization=True)
            return Axis(group, ranks.index(rank), len(ranks))

        def at(d: int, c: int, t: int) -> int:
            return (d * cp + c) * tp + t

        context = cls(
            dp=axis(*(at(d, cp_rank, tp_rank) for d in range(dp))),
            cp=axis(*(at(dp_rank, c, tp_rank) for c in range(cp))),
            tp=axis(*(at(dp_rank, cp_rank, t) for t in range(tp))),
            data=axis(*(at(d, c, tp_rank) for d in range(dp) for c in range(cp))),
            sequence_parallel=sequence_parallel,
        )
        assert (context.dp.rank, context.cp.rank, context.tp.rank) == (dp_rank, cp_rank, tp_rank)
        return context

    @property
    def world_size(self) -> int:
        return self.data.size * self.tp.size

    @property
    def rank(self) -> int:
        return (self.dp.rank * self.cp.size + self.cp.rank) * self.tp.size + self.tp.rank

    @property
    def is_first(self) -> bool:
        """Whether this process is global rank 0, which prints and writes files."""
        return self.rank == 0
