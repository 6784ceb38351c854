"""Decay rates of the token mixer, by global head index and layer.

At each position the state of head h in layer l is multiplied by exp(-rate). Rates are constants: in the paper (arXiv
2307.14995) learnt rates became NaN.
"""

import math

from megatron_tn.config import ModelConfig


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's per-head slopes (arXiv 2108.12409): 2^(-8(h+1)/H) for H a power of two.

    For other H: the slopes of the largest power of two below H, then every second slope of twice that power.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    power = 2 ** math.floor(math.log2(heads))
    return geometric(power) + geometric(2 * power)[0::2][: heads - power]


def decay_rates(
    heads: int, layer: int, layers: int, *, form: str = "released", temperature: bool = True
) -> list[float]:
    """Rates r >= 0 per position of all H heads of layer `layer` = 0..L-1.

    form "released": slope(h) * (1 - l/(L-1) + 1e-5), slope = `alibi_slopes`: the released weights' rates.
    form "paper":    (8h/H) * (1 - l/L) with h = 1..H, equation 10 of arXiv 2307.14995.
    form "none":     0, no decay.
    temperature: False replaces the factor that depends on l by 1.

    Raises:
        ValueError: unknown form.
    """
    if form == "none":
        return [0.0] * heads
    if form == "released":
        slopes = alibi_slopes(heads)
        factor = 1 - layer / max(layers - 1, 1) + 1e-5
    elif form == "paper":
        slopes = [8 * (head + 1) / heads for head in range(heads)]
        factor = 1 - layer / layers
    else:
        raise ValueError(f"decay form {form!r} is not one of released, paper, none")
    return [slope * (factor if temperature else 1.0) for slope in slopes]


def all_decay_rates(config: ModelConfig) -> list[list[float]]:
    """Decay rates [L][H] of a model."""
    return [
        decay_rates(config.heads, layer, config.layers, form=config.decay, temperature=config.decay_temperature)
        for layer in range(config.layers)
    ]
