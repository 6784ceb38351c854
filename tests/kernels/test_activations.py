"""Every place that names activations names the same ones."""

from typing import get_args

import pytest

from kernels.activations import plain, reference
from megatron_tn.config.model import Act


def test_tables_and_settings_have_the_same_names():
    assert set(plain.NAMES) == set(reference.ACTIVATIONS) == set(get_args(Act))


def test_so_has_triton():
    triton_activations = pytest.importorskip("kernels.activations.triton_activations")
    assert set(triton_activations.ACTIVATIONS) == set(plain.NAMES)


def test_an_export_has_all_of_them():
    modeling = pytest.importorskip("megatron_tn.released.modeling_transnormer")
    assert set(modeling.ACTIVATIONS) - {"swish"} == set(plain.NAMES)
