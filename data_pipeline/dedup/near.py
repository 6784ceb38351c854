"""Near duplicates: datatrove's MinHash in four stages, with words that suit code and text without spaces, and with our
own choice of who stays: the copy of the source of highest priority, where datatrove keeps any."""

import functools
import hashlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.text import TextNormConfig, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.config import NearDuplicates
from data_pipeline.dedup import HASH
from data_pipeline.letters import WORDS, composed
from data_pipeline.steps.drops import drop_writer

PIECE = 4096  # runs of words whose permutations are taken at once: 4 MB with 112 hashes
MULTIPLIER, MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, their bits evenly set


class Words(WordTokenizer):
    """Words by pattern. datatrove's default is spacy's English tokenizer, which takes a minute for what takes this a
    second and knows no more about code."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in WORDS.finditer(text)]


class Signature(MinhashDedupSignature):
    """datatrove's signatures over hashes that cost a tenth: each word is hashed once, a run of words is a polynomial of
    its words' hashes, and the permutations are taken in pieces, so that memory does not grow with the document."""

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 [runs, 1], each different run once, sorted."""
        words = self.word_tokenizer.word_tokenize(simplify_text(composed(text), self.config.norm_config))
        runs = len(words) - self.config.n_grams + 1
        if runs < 1:
            return np.empty((0, 1), np.uint64)
        numbers = np.fromiter(map(_word_hash, words), np.uint64, len(words))
        hashes = np.zeros(runs, np.uint64)
        for place in range(self.config.n_grams):  # modulo 2**64, which is what numpy's uint64 does
            hashes = hashes * MULTIPLIER + numbers[place : place + runs]
        hashes ^= hashes >> np.uint64(32)  # the low bits of a polynomial know little of its first words
        return np.unique(hashes * MIXER).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        parts = [
            super(Signature, self).get_signature(shingles[at : at + PIECE]) for at in range(0, len(shingles), PIECE)
        ]
        return np.min(np.array(parts, dtype=np.uint64), axis=0).tolist()


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def minhash_config(settings: NearDuplicates) -> MinhashConfig:
    # Stripping diacritics walks over every character in Python and hardly ever changes what is similar.
    norm = TextNormConfig(norm_unicode_diacritics=False)
    return MinhashConfig(settings.words, settings.buckets, settings.hashes, norm_config=norm, hash_config=HASH)


def signatures(settings: NearDuplicates, work: Path) -> PipelineStep:
    """Per task: each document's signature."""
    return Signature(str(work / "near" / "signatures"), minhash_config(settings), Words())


def buckets(settings: NearDuplicates, work: Path) -> PipelineStep:
    """In one task a bucket: pairs with equal signatures."""
    return MinhashDedupBuckets(
        str(work / "near" / "signatures"), str(work / "near" / "pairs"), config=minhash_config(settings)
    )


class NotePriorities(PipelineStep):
    """Per task: the priority of each document's source, uint16 [documents]."""

    type = "🫂 - DEDUP"
    name = "note priorities"

    def __init__(self, priorities: dict[str, int], folder: Path):
        super().__init__()
        self.priorities = priorities
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        noted = []
        for document in data:
            noted.append(self.priorities[document.metadata["source"]])
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{rank:05d}.npy", np.array(noted, dtype=np.uint16))


class Cluster(PipelineStep):
    """In one task: joins pairs to clusters and writes, for datatrove's filter, which documents of each task go and to
    which cluster they belong. Of a cluster stays the document of the highest priority, of those the first."""

    type = "🫂 - DEDUP"
    name = "clusters"

    def __init__(self, pairs: Path, priorities: Path, output: Path):
        super().__init__()
        self.pairs = pairs
        self.priorities = priorities
        self.output = output

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        clusters = self._clusters()
        priorities = {int(path.stem): np.load(path, allow_pickle=False) for path in self.priorities.glob("*.npy")}
        removed, numbered = defaultdict(list), defaultdict(list)
        for number, members in enumerate(clusters):
            stays = min(members, key=lambda place: (-int(priorities[place[0]][place[1]]), place))
            for task, document in members:
                numbered[task].append((document, number))
                if (task, document) != stays:
                    removed[task].append(document)
        self.output.mkdir(parents=True, exist_ok=True)
        for task, places in numbered.items():
            np.array(sorted(places), dtype="<u4").tofile(self.output / f"{task:06d}.clusters")
            np.array(sorted(removed[task]), dtype="<u4").tofile(self.output / f"{task:06d}.remove")
        return data

    def _clusters(self) -> list[list[tuple[int, int]]]:
        """Connected (task, document) places, each cluster sorted, clusters by their first place."""
        leader: dict[tuple[int, int], tuple[int, int]] = {}

        def find(place: tuple[int, int]) -> tuple[int, int]:
            root = place
            while (above := leader.setdefault(root, root)) != root:
                root = above
            while place != root:  # what was passed now points at the root: the next search is short
                leader[place], place = root, leader[place]
            return root

        for path in sorted(self.pairs.glob("*.dups")):
            for first, one, second, other in np.fromfile(path, dtype="<u4").reshape(-1, 4).tolist():
                low, high = sorted((find((first, one)), find((second, other))))
                leader[high] = low
        clusters = defaultdict(list)
        for place in sorted(leader):
            clusters[find(place)].append(place)
        return list(clusters.values())


def note_priorities(priorities: dict[str, int], work: Path) -> PipelineStep:
    return NotePriorities(priorities, work / "near" / "priorities")


def cluster(work: Path) -> PipelineStep:
    """In one task: connected pairs, and who stays of each cluster."""
    return Cluster(work / "near" / "pairs", work / "near" / "priorities", work / "near" / "remove")


def remove(settings: NearDuplicates, work: Path, drops: Path) -> PipelineStep:
    """Per task: drops all of a cluster but one, recording the cluster and the similarity that the settings catch."""
    similarity = round((1 / settings.buckets) ** (1 / settings.hashes), 3)

    def reason(document: Document) -> dict:
        value = f"cluster:{document.metadata['minhash_cluster_id']}"
        return {"filter": "near_duplicate", "measure": "similarity", "value": value, "threshold": similarity}

    return MinhashDedupFilter(str(work / "near" / "remove"), drop_writer(drops, reason), load_cluster_ids=True)
