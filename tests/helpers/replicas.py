"""Parameters that tensor-parallel ranks repeat must stay bit-equal while they train."""

from collections import Counter
from collections.abc import Sequence

import torch

Masters = dict[tuple[str, int], torch.Tensor]  # (parameter, its first element here) -> values


def replicated(found: dict) -> Masters:
    """Masters of norm weights before the mixers and at the end, which every tensor-parallel rank holds whole: as much
    as the engine leaves this rank. found: of `tests.engine.test_parity.train`."""
    return {place: value for place, value in found["owned"].items() if place[0].endswith("_norm.weight")}


def assert_replicas_equal(ranks: Sequence[Masters], tp: int, layers: int) -> None:
    """Every holder's bits are the same, every norm weight has been trained, and tp ranks or more hold each piece."""
    holders = Counter(place for found in ranks for place, value in found.items() if value.numel())
    assert len({parameter for parameter, _ in holders}) == 2 * layers + 1
    assert all(count % tp == 0 for count in holders.values())
    first = {place: value for found in reversed(ranks) for place, value in found.items()}
    for found in ranks:
        for place, value in found.items():
            assert torch.equal(value, first[place]), place
    assert all((value != 1).any() for value in first.values() if value.numel())  # trained
