"""A filter compared with human verdicts: agreement, precision and recall of its drops, with 95 % intervals.

In a stratified sample, each stratum's share is weighted by its number of documents in the corpus. The interval of the
weighted sum combines the strata's Wilson intervals (Wilson 1927) by MOVER, which recovers a variance from the distance
of each limit to its estimate (Newcombe 1998, Zou and Donner 2008). With one stratum, or without strata, it is Wilson's
interval. Unsure answers and samples on which auditors disagree are counted, but decide nothing.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from data_pipeline.audit.answers import Answer
from data_pipeline.audit.samples import Sample

Z = 1.959963984540054  # the normal distribution's 97.5 % point
UNDECIDED = "unsure"
DISPUTED = "disputed"


@dataclass(frozen=True)
class Estimate:
    """A share with its 95 % interval, and the number of decided samples behind it."""

    value: float
    low: float
    high: float
    decided: int


@dataclass(frozen=True)
class Figures:
    """Filter and human verdicts over some samples. counts: {filter's verdict: {human verdict: samples}}, unweighted;
    precision: share of the filter's drops that people drop; recall: share of the people's drops that the filter drops;
    None without data."""

    samples: int
    answered: int
    counts: dict[str, dict[str, int]]
    agreement: Estimate | None
    precision: Estimate | None
    recall: Estimate | None


@dataclass(frozen=True)
class Summary:
    """`Figures` overall, and by source, language and place. weighted: whether strata were weighted. uncovered: strata
    (source, language, place, verdict, documents) without a decided sample, missing from weighted figures.
    disagreements: ids of samples where people and filter differ. not_blind: answers given with the filter's verdict
    shown. auditors: {name: answers}. pairs, pairs_agree: pairs of decided answers of different auditors on one sample.
    unknown: answers without a sample. median_seconds: per answer."""

    overall: Figures
    weighted: bool
    sources: dict[str, Figures]
    languages: dict[str, Figures]
    places: dict[str, Figures]
    uncovered: list[tuple[str, str, str, str, int]] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    unsure: int = 0
    disputed: int = 0
    not_blind: int = 0
    auditors: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    pairs_agree: int = 0
    unknown: int = 0
    median_seconds: float | None = None


def decisions(samples: Iterable[Sample], answers: Iterable[Answer]) -> dict[str, str]:
    """{answered sample: keep or drop where all deciding auditors agree, disputed where not, unsure if none decides}."""
    by_sample = defaultdict(set)
    for answer in latest(answers):
        by_sample[answer.sample].add(answer.verdict)
    found = {}
    for sample in samples:
        if verdicts := by_sample.get(sample.id):
            decided = verdicts - {UNDECIDED}
            found[sample.id] = DISPUTED if len(decided) > 1 else next(iter(decided), UNDECIDED)
    return found


def latest(answers: Iterable[Answer]) -> list[Answer]:
    """The last answer of each auditor on each sample."""
    return list({(answer.sample, answer.auditor): answer for answer in answers}.values())


def summary(samples: Iterable[Sample], answers: Iterable[Answer]) -> Summary:
    """Compares the filter's verdicts with people's."""
    samples = list(samples)
    known = {sample.id: sample for sample in samples}
    counting = latest(answers)
    decided = decisions(samples, counting)
    weighted = bool(samples) and all(sample.stratum_documents is not None for sample in samples)
    here = [answer for answer in counting if answer.sample in known]
    by_sample = defaultdict(list)
    for answer in here:
        if answer.verdict != UNDECIDED:
            by_sample[answer.sample].append(answer.verdict)
    agreeing = [a == b for verdicts in by_sample.values() for i, a in enumerate(verdicts) for b in verdicts[:i]]

    def grouped(key: Callable[[Sample], str]) -> dict[str, Figures]:
        groups = defaultdict(list)
        for sample in samples:
            groups[key(sample)].append(sample)
        return {name: figures(members, decided, weighted) for name, members in sorted(groups.items())}

    sizes = {sample.stratum: sample.stratum_documents for sample in samples}
    covered = {known[name].stratum for name, verdict in decided.items() if verdict in ("keep", "drop")}
    return Summary(
        overall=figures(samples, decided, weighted),
        weighted=weighted,
        sources=grouped(lambda sample: sample.source),
        languages=grouped(lambda sample: sample.language),
        places=grouped(lambda sample: sample.place),
        uncovered=[(*key, size) for key, size in sorted(sizes.items()) if key not in covered] if weighted else [],
        disagreements=[
            sample.id
            for sample in samples
            if decided.get(sample.id) in ("keep", "drop") and decided[sample.id] != sample.verdict
        ],
        unsure=sum(verdict == UNDECIDED for verdict in decided.values()),
        disputed=sum(verdict == DISPUTED for verdict in decided.values()),
        not_blind=sum(not answer.blind for answer in here),
        auditors=dict(sorted(Counter(answer.auditor for answer in here).items())),
        pairs=len(agreeing),
        pairs_agree=sum(agreeing),
        unknown=len(counting) - len(here),
        median_seconds=median(answer.seconds for answer in here) if here else None,
    )


def figures(samples: list[Sample], decided: dict[str, str], weighted: bool) -> Figures:
    """The comparison over `samples`, by the verdicts of `decisions`."""
    counts = {verdict: {"keep": 0, "drop": 0} for verdict in ("keep", "drop")}
    cells = defaultdict(lambda: [0, 0])  # stratum -> [decided samples, samples that people drop]
    sizes = {}
    for sample in samples:
        verdict = decided.get(sample.id)
        if verdict not in ("keep", "drop"):
            continue
        counts[sample.verdict][verdict] += 1
        cells[sample.stratum][0] += 1
        cells[sample.stratum][1] += verdict == "drop"
        sizes[sample.stratum] = sample.stratum_documents
    answered = sum(sample.id in decided for sample in samples)
    if not weighted:
        right = counts["keep"]["keep"] + counts["drop"]["drop"]
        total = sum(sum(row.values()) for row in counts.values())
        caught, missed = counts["drop"]["drop"], counts["keep"]["drop"]
        both = all(sum(row.values()) for row in counts.values())
        estimates = [
            wilson(right, total),
            wilson(caught, sum(counts["drop"].values())),
            wilson(caught, caught + missed) if both else None,
        ]
        return Figures(len(samples), answered, counts, *estimates)
    dropped = [(sizes[key], bad, n) for key, (n, bad) in cells.items() if key[3] == "drop"]
    kept = [(sizes[key], bad, n) for key, (n, bad) in cells.items() if key[3] == "keep"]
    return Figures(
        len(samples),
        answered,
        counts,
        agreement=_share(dropped + [(size, n - bad, n) for size, bad, n in kept]),
        precision=_share(dropped),
        recall=_recall(dropped, kept),
    )


def wilson(successes: int, trials: int) -> Estimate | None:
    """successes / trials with Wilson's score interval; None without trials."""
    if not trials:
        return None
    share, square = successes / trials, Z * Z
    centre = share + square / (2 * trials)
    spread = Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials * trials))
    scale = 1 + square / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # With a share of 0 or 1, rounding may put a limit on the wrong side of the share.
    return Estimate(share, min(max(low, 0.0), share), max(min(high, 1.0), share), trials)


Cells = list[tuple[int, int, int]]  # (documents of the stratum, successes, trials) of each


def _sum(cells: Cells) -> tuple[float, float, float]:
    """(Estimated number of successful documents over all strata, distance to its lower limit, to its upper limit)."""
    parts = [(size, wilson(successes, trials)) for size, successes, trials in cells]
    value = sum(size * part.value for size, part in parts)
    below = math.sqrt(sum((size * (part.value - part.low)) ** 2 for size, part in parts))
    above = math.sqrt(sum((size * (part.high - part.value)) ** 2 for size, part in parts))
    return value, below, above


def _share(cells: Cells) -> Estimate | None:
    """The share of successes, strata weighted by their documents."""
    if not cells:
        return None
    documents = sum(size for size, _, _ in cells)
    value, below, above = (part / documents for part in _sum(cells))
    return Estimate(value, max(value - below, 0.0), min(value + above, 1.0), sum(n for _, _, n in cells))


def _recall(dropped: Cells, kept: Cells) -> Estimate | None:
    """caught / (caught + missed), both weighted sums. The limits are the r at which the interval of
    (1 - r) caught - r missed, decreasing in r, touches 0. None unless both dropped and kept documents have decided
    samples."""
    if not dropped or not kept:
        return None
    caught, caught_below, caught_above = _sum(dropped)
    missed, missed_below, missed_above = _sum(kept)
    if not caught + missed:
        return None

    def touches(sign: int, of_caught: float, of_missed: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            reach = math.hypot((1 - middle) * of_caught, middle * of_missed)
            if (1 - middle) * caught - middle * missed + sign * reach > 0:
                low = middle
            else:
                high = middle
        return low

    value = caught / (caught + missed)
    low, high = touches(-1, caught_below, missed_above), touches(1, caught_above, missed_below)
    decided = sum(bad for _, bad, _ in (*dropped, *kept))
    return Estimate(value, min(low, value), max(high, value), decided)
