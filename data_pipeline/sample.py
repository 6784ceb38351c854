"""The tokenizer's training sample: drawn from the training split, stratified by source category."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import TokenizerSettings
from data_pipeline.document import in_heldout, text_bytes, text_hash
from data_pipeline.errors import InputError
from data_pipeline.files import replace_file
from data_pipeline.sources import Source, category_of
from data_pipeline.steps.tally import read_tally


@dataclass(frozen=True)
class Stratum:
    """A category's part of the sample: its share of the weights, its bytes of training text, and the bytes wanted."""

    share: float
    available_bytes: int
    wanted_bytes: int

    @property
    def probability(self) -> float:
        """The probability that a document is in the sample."""
        return min(1.0, self.wanted_bytes / max(self.available_bytes, 1))


def strata(
    settings: TokenizerSettings, sources: dict[str, Source], tally: Path, heldout_fraction: float
) -> dict[str, Stratum]:
    """The strata of all categories with text, from the tally after the last stage that drops documents."""
    available, seen = defaultdict(float), defaultdict(float)
    for (source, _), (_, size) in read_tally(tally).items():
        category = category_of(source, sources[source])
        available[category] += size * (1 - heldout_fraction)
        seen[category] += size * sources[source].epochs
    if not (total := sum(seen.values())):
        raise InputError("tokenizer: no document is left to train it on; the report says which rules dropped them")
    natural = {category: max(amount / total, settings.min_share) for category, amount in seen.items() if amount}
    weights = {category: settings.weights[category] for category in natural} if settings.weights else natural
    wanted = allot(settings.sample_bytes, weights, {category: available[category] for category in natural})
    return {
        category: Stratum(weight / sum(weights.values()), round(available[category]), round(wanted[category]))
        for category, weight in sorted(weights.items())
    }


def allot(total: float, weights: dict[str, float], available: dict[str, float]) -> dict[str, float]:
    """`total` divided in proportion to `weights`, no part above its `available`; the other parts share the rest."""
    parts: dict[str, float] = {}
    while len(parts) < len(weights):
        left = {name: weight for name, weight in weights.items() if name not in parts}
        unit = (total - sum(parts.values())) / sum(left.values())
        full = {name: available[name] for name, weight in left.items() if available[name] <= weight * unit}
        parts |= full or {name: weight * unit for name, weight in left.items()}
    return parts


def weight_problems(settings: TokenizerSettings, sources: dict[str, Source]) -> list[str]:
    """A line per category missing from `weights`, and per name in `weights` that no source has as category."""
    if settings.weights is None:
        return []
    known = {category_of(name, source) for name, source in sources.items()}
    lacking = [
        f"tokenizer.weights: no weight for category {name!r} of the sources" for name in known - {*settings.weights}
    ]
    strange = [f"tokenizer.weights.{name}: no source has this category" for name in {*settings.weights} - known]
    return sorted(lacking) + sorted(strange)


class SampleText(PipelineStep):
    """Per task: passes on the sampled documents of the training split, and writes folder/RANK.json, {category:
    [documents, bytes]}. Whether a text is taken is a function of the text and its category's probability."""

    type = "🔤 - TOKENIZER"
    name = "sample text"

    def __init__(
        self,
        settings: TokenizerSettings,
        sources: dict[str, Source],
        tally: Path,
        heldout_fraction: float,
        folder: Path,
    ):
        super().__init__()
        self.settings = settings
        self.sources = sources
        self.tally = tally
        self.heldout_fraction = heldout_fraction
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        parts = strata(self.settings, self.sources, self.tally, self.heldout_fraction)
        categories = {name: category_of(name, source) for name, source in self.sources.items()}
        taken = {category: [0, 0] for category in parts}
        for document in data:
            category = categories[document.metadata["source"]]
            # Hash digits other than those that choose the split, for an independent choice.
            chosen = int(text_hash(document.text)[16:32], 16) < parts[category].probability * 2**64
            if chosen and not in_heldout(document.text, self.heldout_fraction):
                taken[category][0] += 1
                taken[category][1] += text_bytes(document)
                yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / f"{rank:05d}.json", json.dumps(taken).encode())

    def summary(self) -> dict[str, dict]:
        """{category: bytes wanted; documents and bytes taken, over all tasks}."""
        parts = strata(self.settings, self.sources, self.tally, self.heldout_fraction)
        summary = {category: {**asdict(part), "documents": 0, "bytes": 0} for category, part in parts.items()}
        for path in sorted(self.folder.glob("*.json")):
            for category, (documents, size) in json.loads(path.read_bytes()).items():
                summary[category]["documents"] += documents
                summary[category]["bytes"] += size
        return summary
