"""Random numbers by a counter-based generator, keyed by (key, position).

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), whose n-th output is a
function of n alone: mix(key + n * GAMMA). Integer arithmetic modulo 2^64, so CPU and GPU give the same bits, a CUDA
graph draws without state, and a row's numbers do not depend on the rows beside it.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that has it."""
    return value - 2**64 if value >= 2**63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """keys, positions int64 [B] -> fp64 [B], uniform in [0, 1): multiples of 2^-52, so that u x < x for every x > 0."""
    z = keys + positions * GAMMA
    z = (z ^ _shift(z, 30)) * MULTIPLIERS[0]
    z = (z ^ _shift(z, 27)) * MULTIPLIERS[1]
    z = z ^ _shift(z, 31)
    return _shift(z, 12).to(torch.float64) * 2.0**-52


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; >> repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
