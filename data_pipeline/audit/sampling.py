"""Which documents people are shown: both tails and both borders of what a filter keeps, not a sample of the middle.

Where a threshold is right or wrong is decided at its border; what it must never let through, or never drop, is in the
tails.
"""

from dataclasses import dataclass

import numpy as np

PLACES = ("low tail", "low border", "high border", "high tail")


@dataclass(frozen=True)
class Chosen:
    """Document `index` of the scores given, its score, and the place it was chosen for."""

    index: int
    score: float
    place: str


def tails_and_borders(
    scores: np.ndarray, low: float | None, high: float | None, *, each: int, seed: int
) -> list[Chosen]:
    """At most `each` documents for every place, no document twice, in random order so that order tells nothing.

    scores: float [documents]; NaN, a document that was not scored, is never chosen. low, high: the band that is kept;
    None leaves a side open, which then has a tail and no border.
    """
    if each < 1:
        raise ValueError(f"each={each} must be at least 1")
    ranked = [int(index) for index in np.argsort(scores, kind="stable") if not np.isnan(scores[index])]
    wanted = {"low tail": ranked, "high tail": ranked[::-1]}
    for place, threshold in (("low border", low), ("high border", high)):
        if threshold is not None:
            wanted[place] = sorted(ranked, key=lambda index: abs(scores[index] - threshold))
    chosen: dict[int, str] = {}
    for place in PLACES:
        fresh = (index for index in wanted.get(place, []) if index not in chosen)
        chosen.update({index: place for index, _ in zip(fresh, range(each), strict=False)})
    found = [Chosen(index, float(scores[index]), place) for index, place in chosen.items()]
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))]
