"""Draws the audit's sample from scored shards: `python -m data_pipeline.audit draw manifest=... ...`."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from data_pipeline.audit.samples import Sample, sample_id
from data_pipeline.audit.sampling import Chosen, tails_and_borders
from data_pipeline.errors import InputError
from data_pipeline.shards.index import LANGUAGE, language_code
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reading import read_shard, shard_index
from data_pipeline.shards.scores import MEASURES, load_scores
from data_pipeline.stream.score_filter import ScoreFilter

Group = tuple[str, str]  # source, language
Progress = Callable[[str, int, int], None]


def draw(
    manifest: Manifest,
    filter: ScoreFilter,
    *,
    each: int,
    seed: int,
    border: float = 0.02,
    max_characters: int = 1_000_000,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[tuple[Sample, str]]:
    """Samples by `tails_and_borders` for every source and language, with texts cut at `max_characters`; in random
    order, so that the first n are a random part. A text sampled twice is returned once.

    `progress(stage, done, total)`: shards read, for stages `scores` and `texts`. Raises InputError naming scores, index
    or shard that cannot be used, or if no document is scored.
    """
    from data_pipeline.tokenizer import load

    chosen = _choose(manifest, filter, each, seed, border, progress)
    tokenizer = load(manifest.local(manifest.tokenizer.file))
    found: dict[str, tuple[Sample, str]] = {}
    for done, (number, here) in enumerate(sorted(chosen.items()), 1):
        shard = manifest.shards[number]
        scores, _ = load_scores(manifest.read, shard, filter.scores)
        for position, document in enumerate(read_shard(manifest, shard)):
            if position not in here:
                continue
            (source, language), one = here[position]
            low, high = filter.band(source, language)
            text = tokenizer.decode(_body(document.tokens, manifest).tolist(), skip_special_tokens=False)
            measured = {name: _number(score) for name, score in zip(MEASURES, scores[position], strict=True)}
            sample = Sample(
                id=sample_id(source, text),
                source=source,
                language=language,
                verdict="keep" if one.kept else "drop",
                place=one.place,
                measure=filter.measure,
                **measured,
                low=low,
                high=high,
                document=str(document.metadata.get("id", "")),
                key=str(document.metadata.get("key", "")),
                shard=shard.name,
                position=position,
                bytes=document.metadata["bytes"],
                tokens=len(document.tokens),
                characters=len(text),
                stratum_documents=one.stratum_documents,
                probability=one.probability,
            )
            found.setdefault(sample.id, (sample, text[:max_characters]))
        progress("texts", done, len(chosen))
    order = list(found.values())
    for place in np.random.default_rng(seed).permutation(len(order)):
        yield order[place]


def _choose(
    manifest: Manifest, filter: ScoreFilter, each: int, seed: int, border: float, progress: Progress
) -> dict[int, dict[int, tuple[Group, Chosen]]]:
    """{number of a shard: {position in it: the document chosen there, and its group}}."""
    values, places = group_scores(manifest, filter.scores, filter.measure, progress)
    chosen = defaultdict(dict)
    for group in sorted(values):
        low, high = filter.band(*group)
        for one in tails_and_borders(values[group], low, high, each=each, seed=_group_seed(seed, group), border=border):
            number, position = map(int, places[group][one.index])
            chosen[number][position] = (group, one)
    if not chosen:
        raise InputError(
            f"scores {filter.scores}: no document of {manifest.directory} has a score; python -m megatron_tn.score "
            "writes scores"
        )
    return chosen


def group_scores(
    manifest: Manifest, name: str, measure: str, progress: Progress
) -> tuple[dict[Group, np.ndarray], dict[Group, np.ndarray]]:
    """{source and language: scores `name` by `measure`, float32 [documents]}, and the [shard, position] of each."""
    values, places = defaultdict(list), defaultdict(list)
    column = MEASURES.index(measure)
    for number, shard in enumerate(manifest.shards):
        scores, _ = load_scores(manifest.read, shard, name)
        try:
            index = shard_index(manifest, shard)
        except OSError as error:
            raise InputError(f"index {shard.index}: {error.strerror or error}") from None
        for language in np.unique(index[:, LANGUAGE]):
            here = np.flatnonzero(index[:, LANGUAGE] == language)
            group = shard.source, language_code(language)
            values[group].append(scores[here, column])
            places[group].append(np.stack([np.full(len(here), number), here], axis=1))
        progress("scores", number + 1, len(manifest.shards))
    joined = {group: np.concatenate(parts) for group, parts in values.items()}
    return joined, {group: np.concatenate(parts) for group, parts in places.items()}


def _body(tokens: np.ndarray, manifest: Manifest) -> np.ndarray:
    start = int(tokens[0] == manifest.tokenizer.bos)
    stop = len(tokens) - int(len(tokens) > start and tokens[-1] == manifest.tokenizer.eos)
    return tokens[start:stop]


def _number(score: np.float32) -> float | None:
    """A score as a float; None for NaN, a document that was not scored."""
    return None if np.isnan(score) else float(score)


def _group_seed(seed: int, group: Group) -> int:
    """A different seed for each group, so that groups do not pick the same ranks."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{group[0]}\0{group[1]}".encode()).digest()[:8], "little")
