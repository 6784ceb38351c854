"""Overlap of held-out with training text: passages of RUN equal tokens, which document deduplication leaves."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_documents

RUN = 13  # tokens of a passage that counts as the same
STEP = 8_000_000  # passages of training text looked up at a time
FACTOR = np.uint64(6364136223846793005)  # base of the polynomial hash of a passage, modulo 2^64


def overlap(train: Manifest, held_out: Manifest) -> dict[str, dict[str, float]]:
    """{source: `passages`: share of the held-out passages of RUN tokens that occur in a training document; `documents`:
    number of held-out documents; `over_half`: of these, those with more than half of their passages in training}."""
    weights = np.random.default_rng(0).integers(1, 2**63, held_out.tokenizer.vocab_size, dtype=np.uint64)
    found = [
        (document.metadata["source"], _passages(document.tokens, weights)) for document in read_documents(held_out)
    ]
    wanted = np.unique(np.concatenate([passages for _, passages in found]))
    seen = np.zeros(len(wanted), dtype=bool)
    for passages in _in_steps(_passages(document.tokens, weights) for document in read_documents(train)):
        own = np.unique(passages)
        places = np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)
        seen[places[wanted[places] == own]] = True
    everything, shared, documents, over = Counter(), Counter(), Counter(), Counter()
    for source, passages in found:
        hits = int(seen[np.searchsorted(wanted, passages)].sum())
        everything[source] += len(passages)
        shared[source] += hits
        documents[source] += 1
        over[source] += 2 * hits > len(passages)
    return {
        source: {
            "passages": shared[source] / max(everything[source], 1),
            "documents": documents[source],
            "over_half": over[source],
        }
        for source in sorted(documents)
    }


def _passages(tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Hashes of all runs of RUN tokens of a document, without bos and eos, uint64 [max(n - 2 - RUN + 1, 0)]."""
    values = weights[tokens[1:-1]]
    hashes = np.zeros(max(len(values) - RUN + 1, 0), dtype=np.uint64)
    for place in range(RUN):
        hashes = hashes * FACTOR + values[place : place + len(hashes)]
    return hashes


def _in_steps(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The parts end to end, about STEP values at a time."""
    waiting, size = [], 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= STEP:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)
