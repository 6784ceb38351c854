"""engine.products=fp8 where a rank keeps its weights whole: the blocks' matrices are kept in fp8, and not in bf16.

Products read fp8 operands, and masters are fp32. A matrix exists in the computing type, as the model's parameter, only
for a moment after each change of the masters, to be gathered over ranks and quantised; and for passes without
gradients, such as an evaluation. At other times the memory of its storage is freed.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tn.engine.shards import Shards
from megatron_tn.optim.adamw import write_copies
from megatron_tn.parallel.collectives import gather_parts_
from megatron_tn.parallel.float8_layers import kept_weights, layer_groups
from megatron_tn.parallel.linear import SplitLinear

# Bytes of weights in the computing type that exist at a time: gathering several buckets in one NCCL call, and
# quantising several layers in one launch, are faster than one by one.
PORTION_BYTES = 2**28


@dataclass(frozen=True)
class Bucket:
    """Matrices whose parameters are views of `flat`, of the computing type. copies: master -> its part of `flat`.
    quantize: writes their fp8 operands."""

    flat: Tensor
    copies: Mapping[Tensor, Tensor]
    quantize: Callable[[], None]

    @property
    def size(self) -> int:
        """Bytes of `flat`."""
        return self.flat.numel() * self.flat.element_size()

    def free(self) -> None:
        self.flat.untyped_storage().resize_(0)


class FreedWeights:
    """The weights of `layers`, kept in fp8 alone. transposed: see `KeptWeights`.

    The constructor removes these weights from shards.copies and shards.whole, so that `Update` no longer writes them.
    Parameters that are their own masters (fp32, engines without sharding) stay in memory beside their fp8 operands.
    """

    def __init__(self, shards: Shards, layers: Sequence[SplitLinear], *, transposed: bool):
        self.axis = shards.sharded_over
        self.buckets: list[Bucket] = []
        self.masters: Callable[[], None] | None = None  # quantises parameters that are masters
        groups = layer_groups(layers)
        if not shards.copies:
            self.masters = kept_weights(groups, transposed=transposed)
            return
        found: dict[int, tuple[Tensor, list]] = {}
        whole = shards.whole or _flattened([[layer.weight for layer in group] for group in groups])
        flats = {_storage(flat): flat for flat in whole}
        for group in groups:
            storage = _storage(group[0].weight)
            found.setdefault(storage, (flats[storage], []))[1].append(group)
        for storage, (flat, members) in found.items():
            copies = {master: copy for master, copy in shards.copies.items() if _storage(copy) == storage}
            self.buckets.append(Bucket(flat, copies, kept_weights(members, transposed=transposed)))
        taken = set(found)
        shards.copies = {master: copy for master, copy in shards.copies.items() if _storage(copy) not in taken}
        shards.whole = [flat for flat in shards.whole if _storage(flat) not in taken]
        self._free(self.buckets)

    def quantize(self) -> None:
        """Write the operands of the masters' new values. Collective."""
        if self.masters is not None:
            self.masters()
        for buckets in self._portions():
            self._make(buckets)
            for bucket in buckets:
                bucket.quantize()
            self._free(buckets)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Context manager: within it all parameters hold their values in the computing type. Collective."""
        try:
            self._make(self.buckets)
            yield
        finally:
            self._free(self.buckets)

    def _portions(self) -> Iterator[list[Bucket]]:
        """The buckets, one by one; several at a time where they are gathered."""
        portion, size = [], 0
        for bucket in self.buckets:
            if portion and (self.axis.size == 1 or size + bucket.size > PORTION_BYTES):
                yield portion
                portion, size = [], 0
            portion.append(bucket)
            size += bucket.size
        if portion:
            yield portion

    @torch.no_grad()
    def _make(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            bucket.flat.untyped_storage().resize_(bucket.size)
            write_copies(bucket.copies)
        gather_parts_([bucket.flat for bucket in buckets], self.axis)

    def _free(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            bucket.free()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flattened(groups: Sequence[Sequence[torch.nn.Parameter]]) -> list[Tensor]:
    """Move weights that have a storage each into flat tensors of about PORTION_BYTES, of which they become views; the
    weights of a group are adjacent in one tensor."""
    portions: list[list[torch.nn.Parameter]] = [[]]
    size = 0
    for group in groups:
        if size > PORTION_BYTES:
            portions.append([])
            size = 0
        portions[-1] += group
        size += sum(weight.numel() * weight.element_size() for weight in group)
    flats = []
    for weights in portions:
        flats.append(torch.cat([weight.detach().flatten() for weight in weights]))
        for weight, part in zip(weights, flats[-1].split([weight.numel() for weight in weights]), strict=True):
            weight.data = part.view(weight.shape)
    return flats
