"""What an engine tells `engine.update.Update` of the masters that a rank holds."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_tn.parallel.context import Axis


class Placement(NamedTuple):
    """Elements [start, stop) of parameter `name`, flattened as this tensor-parallel rank holds it, lie in
    masters[master], flattened, from `offset` on."""

    name: str
    start: int
    stop: int
    master: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """View [stop - start] of this placement's elements. tensor: of the shape of masters[master]."""
        return tensor.view(-1).narrow(0, self.offset, self.stop - self.start)


class Shards(Protocol):
    """The masters that a rank updates.

    masters: the optimizer's fp32 tensors, of any shape; one master may hold several parameters.
    copies: master -> the same elements in the computing type, of the master's shape; no entry for a master that the
    model computes with directly.
    whole: the flat tensors that hold the model's parameters, where they are views of such.
    placements: position of every parameter's elements in the masters; padding of a master belongs to no placement.
    sharded_over: the axis over whose ranks the elements are partitioned; of size 1 where every rank holds all.
    """

    masters: Sequence[Tensor]
    copies: Mapping[Tensor, Tensor]
    whole: Sequence[Tensor]
    placements: Sequence[Placement]
    sharded_over: Axis

    def gradients(self) -> Sequence[Tensor]:
        """After the last microbatch: one fp32 gradient per master, of the master's shape, summed over ranks."""
        ...

    def clear(self) -> None:
        """Clear the gradients, after an applied or a skipped update."""
        ...

    def publish(self) -> None:
        """After a change of masters and copies: update the model's parameters on every rank. Collective."""
        ...
