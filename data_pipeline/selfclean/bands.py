"""Chooses the band of scores to keep, by quantiles per source and language.

Documents with a very low loss are boilerplate, with a very high loss noise. The loss of good text differs between
sources and languages, so each pair with enough documents has its own band.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_pipeline.stream.score_filter import Band, ScoreFilter
from data_pipeline.thresholds import STRICT, Positive, Share


@dataclass(frozen=True, config=STRICT)
class Quantiles:
    """Of each source and language, documents are kept whose score lies between the quantiles `low` and `high`.
    `sources`: {NAME: [LOW, HIGH]} sets the quantiles of one source. A pair of source and language with fewer than
    `minimum` scored documents uses its source's band; a source with fewer, the band of all documents."""

    low: Share = 0.02
    high: Share = 0.98
    minimum: Positive = 1000
    sources: dict[str, tuple[Share, Share]] = Field(default_factory=dict)

    def __post_init__(self):
        for name, (low, high) in {"quantiles": (self.low, self.high), **self.sources}.items():
            if low >= high:
                raise ValueError(f"{name}: low={low} must be below high={high}")


def choose_bands(
    scores: Mapping[tuple[str, str], np.ndarray], quantiles: Quantiles, *, name: str, measure: str
) -> ScoreFilter:
    """The filter on scores `name`. Its thresholds are scores of documents, which are kept.

    scores: {(source, language): float [documents]} of one measure; NaN, a document that was not scored, is ignored.
    Raises ValueError when no document is scored or an override names a source that has none.
    """
    groups = {key: found for key, values in scores.items() if len(found := values[np.isfinite(values)])}
    if not groups:
        raise ValueError(f"scores {name}: no document has a score")
    sources = sorted({source for source, _ in groups})
    if unknown := sorted(set(quantiles.sources) - set(sources)):
        raise ValueError(f"quantiles of {', '.join(unknown)}: no such source is scored, there are {', '.join(sources)}")
    pooled = {source: np.concatenate([v for (s, _), v in groups.items() if s == source]) for source in sources}
    everything = np.concatenate(list(groups.values()))
    usual = (quantiles.low, quantiles.high)
    bands = {}
    for source, values in pooled.items():
        if len(values) >= quantiles.minimum:
            bands[source] = _band(values, quantiles.sources.get(source, usual))
        elif source in quantiles.sources:
            bands[source] = _band(everything, quantiles.sources[source])
    for (source, language), values in sorted(groups.items()):
        if len(values) >= quantiles.minimum:
            bands[f"{source}/{language}"] = _band(values, quantiles.sources.get(source, usual))
    return ScoreFilter(scores=name, measure=measure, default=_band(everything, usual), bands=bands)


def _band(values: np.ndarray, quantiles: tuple[float, float]) -> Band:
    # Thresholds are scores of documents, without interpolation between them.
    low, high = np.quantile(values, quantiles, method="inverted_cdf")
    return float(low), float(high)
