from pathlib import Path

import pytest

from tests.helpers.programs import forked_programs  # noqa: F401
from tests.helpers.shards import make_text_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """manifest.json of a small corpus."""
    directory = tmp_path_factory.mktemp("shards")
    make_text_shards(directory)
    return directory / "manifest.json"
