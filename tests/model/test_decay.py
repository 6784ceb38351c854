"""Decay rates: ALiBi's slopes for every head count, the layer's temperature, and the paper's printed form."""

import math

import pytest

from megatron_tn.model.decay import alibi_slopes, decay_rates


def test_slopes_of_a_power_of_two():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]


def test_slopes_interleave_otherwise():
    # Six heads: four of 4, then every second one of 8.
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 20, 32, 40, 96])
def test_as_many_positive_slopes_as_heads(heads):
    slopes = alibi_slopes(heads)
    assert len(slopes) == heads
    assert all(0 < slope <= 1 for slope in slopes)


def test_released_form_cools_with_depth():
    first, last = decay_rates(4, 0, 3), decay_rates(4, 2, 3)
    assert first == pytest.approx([slope * 1.00001 for slope in alibi_slopes(4)])
    assert last == pytest.approx([slope * 1e-5 for slope in alibi_slopes(4)])


def test_one_layer_does_not_divide_by_zero():
    assert all(math.isfinite(rate) and rate > 0 for rate in decay_rates(4, 0, 1))


def test_paper_form():
    assert decay_rates(4, 1, 4, form="paper") == pytest.approx([2 * 0.75, 4 * 0.75, 6 * 0.75, 8 * 0.75])


def test_without_temperature_layers_are_alike():
    assert decay_rates(4, 0, 3, temperature=False) == decay_rates(4, 2, 3, temperature=False) == alibi_slopes(4)


def test_no_decay():
    assert decay_rates(4, 1, 3, form="none") == [0.0] * 4


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="'exponential' is not one of released, paper, none"):
        decay_rates(4, 0, 3, form="exponential")
