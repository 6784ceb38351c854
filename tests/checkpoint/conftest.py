from pathlib import Path

import pytest

from tests.checkpoint.engines import save_after_two_steps
from tests.engine.test_parity import LOCAL
from tests.helpers.ranks import run_shared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of one process at step 2; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_shared(1, save_after_two_steps, folder, 1, LOCAL)
    return folder / "step_00000002"
