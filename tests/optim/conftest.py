import sys
import types

import pytest

from tests.helpers.apex import FusedAdam


@pytest.fixture
def apex(monkeypatch):
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
