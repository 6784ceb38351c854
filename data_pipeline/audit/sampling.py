"""The audit's stratified sample: both tails, both borders (next to the thresholds), and the middle of the kept band.

Borders show whether a threshold is too high or too low, tails whether gross errors occur, the middle what is kept
unseen. Every scored document is in exactly one stratum (place, filter's verdict), each sampled at random, so that
figures of the sample can be weighted to the corpus.
"""

from dataclasses import dataclass

import numpy as np

PLACES = ("low tail", "low border", "middle", "high border", "high tail")


@dataclass(frozen=True)
class Chosen:
    """Document `index` of the given scores, its score, its place, and whether the filter keeps it.

    `stratum_documents`: documents in its stratum (place and verdict); `probability`: the share of them that was chosen.
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
    """About `each` documents for every place, no document twice, in random order.

    scores: float [documents]; NaN, a document that was not scored, is never chosen. low, high: the kept band low <=
    score <= high; None leaves a side open. Border: the documents next to a threshold, on either side of it
    max(`each`, `border` * documents), but at most half of the side's dropped documents, or half of the kept ones;
    `each` / 2 are drawn from either side. Tail: the dropped documents beyond the border; on an open side, the outermost
    kept ones.
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
    """(place, kept, start, stop) of every non-empty stratum, ranges that cover `ordered`, ascending scores [documents].
    `width`: documents of a border on either side of its threshold."""
    documents = len(ordered)
    # Thresholds in the scores' dtype, as in the filter's comparison.
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
