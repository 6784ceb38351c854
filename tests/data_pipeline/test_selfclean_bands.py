"""The band of scores that is kept, per source and language, with its fallbacks."""

import numpy as np
import pytest

from data_pipeline.selfclean.bands import Quantiles, choose_bands

SCORES = {
    ("web", "en"): np.arange(1.0, 101.0, dtype=np.float32),
    ("web", "zh"): np.arange(1001.0, 1006.0, dtype=np.float32),
    ("books", "en"): np.array([np.nan, 5.0, 7.0], dtype=np.float32),
}


def chosen(**settings):
    return choose_bands(SCORES, Quantiles(**settings), name="eval", measure="nats_per_token")


def test_each_group_of_enough_documents_has_its_own_band():
    found = chosen(low=0.1, high=0.9, minimum=50)
    assert found.band("web", "en") == (10.0, 90.0)
    # Too few in Chinese: the source's 105 documents say. Too few books: all 107 do.
    assert found.band("web", "zh") == (11.0, 95.0)
    assert found.band("books", "en") == found.default == (9.0, 95.0)


def test_a_group_counts_scored_documents_alone():
    assert chosen(low=0, high=1, minimum=2).band("books", "en") == (5.0, 7.0)
    assert "books/en" not in chosen(low=0, high=1, minimum=3).bands


def test_a_source_has_its_own_quantiles_also_where_it_is_small():
    found = chosen(low=0.1, high=0.9, minimum=50, sources={"books": (0, 1)})
    assert found.band("books", "en") == (1.0, 1005.0)
    assert found.band("web", "en") == (10.0, 90.0)


@pytest.mark.parametrize("settings", [{"low": 0.9, "high": 0.1}, {"high": 1.5}, {"minimum": 0}])
def test_settings_that_make_no_band_are_named(settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        Quantiles(**settings)


def test_an_unknown_source_and_no_scores_are_named():
    with pytest.raises(ValueError, match=r"wiki.*books, web"):
        chosen(sources={"wiki": (0.1, 0.9)})
    with pytest.raises(ValueError, match="no document has a score"):
        choose_bands({("web", "en"): np.array([np.nan])}, Quantiles(), name="eval", measure="nats_per_token")
