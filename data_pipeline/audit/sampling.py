"""Which documents people are shown: a random sample of both tails, of both borders of what a filter keeps, and of the
middle.

Where a threshold is right or wrong is decided at its border; what it must never let through, or never drop, is in the
tails; and what it lets through unseen is in the middle. Every scored document is in exactly one stratum, a place and
the filter's verdict, and each stratum is sampled at random, so that figures of the sample can be weighted back to the
corpus.
"""

from dataclasses import dataclass

import numpy as np

PLACES = ("low tail", "low border", "middle", "high border", "high tail")


@dataclass(frozen=True)
class Chosen:
    """Document `index` of the scores given, its score, the place it was chosen for, and whether the filter keeps it.

    `stratum_documents`: how many documents are in its stratum (place and verdict); `probability`: the share of them
    that was chosen.
    """

    index: int
    score: float
    place: str
    kept: bool
    stratum_documents: int
    probability: float


def tails_and_borders(
    scores: np.ndarray, low: float | None, high: float | None, *, each: int, seed: int, border: float = 0.02
) -> list[Chosen]:
    """About `each` documents for every place, no document twice, in random order so that order tells nothing.

    scores: float [documents]; NaN, a document that was not scored, is never chosen. low, high: the band low <= score <=
    high that is kept; None leaves a side open. A border is the documents next to a threshold: on either side of it
    max(`each`, `border` of all), but no more than half of what the side drops, or half of what is kept; half of `each`
    is drawn from either side. A tail is what is dropped beyond the border, and on an open side the outermost kept ones.
    """
    if each < 1:
        raise ValueError(f"each={each} must be at least 1")
    if not 0 < border < 1:
        raise ValueError(f"border={border} must be between 0 and 1")
    ranked = np.argsort(scores, kind="stable")
    ranked = ranked[: len(scores) - int(np.isnan(scores).sum())]
    random = np.random.default_rng(seed)
    chosen = []
    for place, kept, start, stop in strata(scores[ranked], low, high, width=max(each, round(border * len(ranked)))):
        wanted = (each + 1) // 2 if place.endswith("border") else each
        drawn = start + random.choice(stop - start, size=min(wanted, stop - start), replace=False)
        chosen += [
            Chosen(int(index), float(scores[index]), place, kept, stop - start, len(drawn) / (stop - start))
            for index in ranked[drawn]
        ]
    return [chosen[place] for place in random.permutation(len(chosen))]


def strata(
    ordered: np.ndarray, low: float | None, high: float | None, *, width: int
) -> list[tuple[str, bool, int, int]]:
    """(place, kept, start, stop) of every stratum that has documents, as ranges that cover `ordered`, ascending scores
    [documents]; `width`: documents of a border on either side of its threshold."""
    documents = len(ordered)
    # In the scores' own precision, as the filter compares.
    below = 0 if low is None else int(np.searchsorted(ordered, ordered.dtype.type(low), "left"))
    above = 0 if high is None else documents - int(np.searchsorted(ordered, ordered.dtype.type(high), "right"))
    inside = min(width, (documents - below - above) // 2)
    low_edge, high_edge = below - min(width, (below + 1) // 2), documents - above + min(width, (above + 1) // 2)
    found = [
        ("low tail", False, 0, low_edge),
        ("low border", False, low_edge, below),
        ("low tail" if low is None else "low border", True, below, below + inside),
        ("middle", True, below + inside, documents - above - inside),
        ("high tail" if high is None else "high border", True, documents - above - inside, documents - above),
        ("high border", False, documents - above, high_edge),
        ("high tail", False, high_edge, documents),
    ]
    return [stratum for stratum in found if stratum[3] > stratum[2]]
