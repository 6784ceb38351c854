"""Near duplicates: datatrove's MinHash in four stages, with a word pattern for code and for scripts without spaces. The
copy in the source of highest priority stays; datatrove keeps any."""

import contextlib
import hashlib
import re
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
from datatrove.utils.batching import batched
from datatrove.utils.text import TextNormConfig, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.config import NearDuplicates
from data_pipeline.dedup import HASH
from data_pipeline.dedup.stayed import RecordStayed
from data_pipeline.letters import WORDS, composed, find_words
from data_pipeline.steps.drops import drop_writer

PRIME = np.uint64(2**61 - 1)  # datatrove's permutations: x -> (a x + b mod 2**64) mod PRIME
SHIFT = np.uint64(61)
PIECE = 64  # shingles permuted at once: 57 kB with 112 hashes, fits a core's cache
MULTIPLIER, MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, about half of their bits set
MOST_WORDS = 1 << 18  # words whose hashes are cached
DOCUMENTS = 1024  # signatures per write
ASCII_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)?")
ASCII_WORD = re.compile(r"[a-z0-9]+")


class Words(WordTokenizer):
    """Words by regular expression. datatrove's default, spacy's English tokenizer, is 60 times slower and no better on
    code."""

    def word_tokenize(self, text: str) -> list[str]:
        return find_words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in WORDS.finditer(text)]


class Signature(MinhashDedupSignature):
    """datatrove's signatures at a tenth of the cost: each word is hashed once, a shingle's hash is a polynomial of its
    words' hashes, and permutations are computed in pieces, so that memory does not grow with the document."""

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of the shingles (runs of words), uint64 [runs, 1]."""
        words = self._words(text)
        runs = len(words) - self.config.n_grams + 1
        if runs < 1:
            return np.empty((0, 1), np.uint64)
        if len(_word_hashes) > MOST_WORDS:
            _word_hashes.clear()
        numbers = np.frombuffer(b"".join(map(_word_hashes.__getitem__, words)), np.dtype("<u8"))
        hashes = np.zeros(runs, np.uint64)
        for place in range(self.config.n_grams):  # modulo 2**64: numpy's uint64 wraps
            hashes = hashes * MULTIPLIER + numbers[place : place + runs]
        hashes ^= hashes >> np.uint64(32)  # the polynomial's low bits depend little on the first words
        return (hashes * MIXER).reshape(-1, 1)

    def _words(self, text: str) -> list[str]:
        """The words for shingles: in lower case, numbers as 0, without punctuation."""
        if text.isascii():  # same result as below, three times as fast
            return ASCII_WORD.findall(ASCII_NUMBER.sub("0", text.lower()))
        return self.word_tokenizer.word_tokenize(simplify_text(composed(text), self.config.norm_config))

    def get_signature(self, shingles: np.ndarray) -> np.ndarray:
        """The minimum of each permutation over all shingles, uint64 [buckets, hashes]."""
        multipliers, summands = self.parameters
        least = np.full(self.num_hashes, np.iinfo(np.uint64).max, np.uint64)
        values, high = np.empty((2, PIECE, self.num_hashes), np.uint64)
        for at in range(0, len(shingles), PIECE):
            piece = shingles[at : at + PIECE]
            x, q = values[: len(piece)], high[: len(piece)]
            np.multiply(piece, multipliers, out=x)
            x += summands
            # With x = q 2**61 + r, x mod PRIME is q + r or q + r - PRIME; a negative q + r - PRIME wraps to a large
            # number, so the minimum of both is right.
            np.right_shift(x, SHIFT, out=q)
            x &= PRIME
            x += q
            np.subtract(x, PRIME, out=q)
            np.minimum(x, q, out=x)
            np.minimum(least, x.min(axis=0), out=least)
        return least.reshape(self.config.num_buckets, self.config.hashes_per_bucket)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes bucket_NNN/RANK.minhash.sig in datatrove's format: sorted records of a bucket's hashes and the
        document's index in the task."""
        record = np.dtype([("hashes", "<u8", (self.config.hashes_per_bucket,)), ("document", "<u4")])
        folder = self.output_folder
        names = [f"bucket_{bucket:03d}/{rank:05d}.minhash.sig" for bucket in range(self.config.num_buckets)]
        with self.track_time(), contextlib.ExitStack() as stack:
            files = [stack.enter_context(folder.open(name, "wb")) for name in names]
            for documents in batched(enumerate(data), DOCUMENTS):
                shingles = ((place, self.get_shingles(document.text)) for place, document in documents)
                signed = [(place, self.get_signature(found)) for place, found in shingles if len(found)]
                records = np.empty((self.config.num_buckets, len(signed)), record)
                for at, (place, signature) in enumerate(signed):
                    records["hashes"][:, at], records["document"][:, at] = signature, place
                for file, rows in zip(files, records, strict=True):
                    file.write(rows.tobytes())
        for name in names:
            with folder.open(name, "rb") as file:
                rows = np.frombuffer(file.read(), record)
            keys = (rows["document"], *rows["hashes"].T[::-1])  # lexsort: the last key is the primary one
            with folder.open(name, "wb") as file:
                file.write(rows[np.lexsort(keys)].tobytes())


class _WordHashes(dict):
    """{word: eight bytes of its hash}."""

    def __missing__(self, word: str) -> bytes:
        self[word] = found = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return found


_word_hashes = _WordHashes()


def minhash_config(settings: NearDuplicates) -> MinhashConfig:
    # Stripping diacritics is a Python loop over characters and hardly changes similarities.
    norm = TextNormConfig(norm_unicode_diacritics=False)
    return MinhashConfig(settings.words, settings.buckets, settings.hashes, norm_config=norm, hash_config=HASH)


def signatures(settings: NearDuplicates, work: Path) -> PipelineStep:
    """Per task: each document's signature."""
    return Signature(str(work / "near" / "signatures"), minhash_config(settings), Words())


def buckets(settings: NearDuplicates, work: Path) -> PipelineStep:
    """One task per bucket: pairs with equal signatures."""
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
    """In one task: joins pairs to clusters and writes, for datatrove's filter, the documents to remove per task and
    their clusters. Of each cluster, the first document of the highest priority stays."""

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
            while place != root:  # path compression
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
    """In one task: clusters of connected pairs, and the document that stays of each."""
    return Cluster(work / "near" / "pairs", work / "near" / "priorities", work / "near" / "remove")


def remove(settings: NearDuplicates, work: Path, drops: Path) -> list[PipelineStep]:
    """Per task: drops all but one document of a cluster, recording the cluster and the settings' threshold, and records
    the documents that stay."""
    similarity = round((1 / settings.buckets) ** (1 / settings.hashes), 3)

    def reason(document: Document) -> dict:
        return {
            "filter": "near_duplicate",
            "measure": "similarity",
            "value": _cluster_of(document),
            "threshold": similarity,
        }

    drop = MinhashDedupFilter(str(work / "near" / "remove"), drop_writer(drops, reason), load_cluster_ids=True)
    return [drop, RecordStayed(work / "near" / "stayed", _cluster_of)]


def _cluster_of(document: Document) -> str | None:
    # Absent in a task without duplicates, -1 for a document without duplicates.
    cluster = document.metadata.get("minhash_cluster_id", -1)
    return None if cluster < 0 else f"cluster:{cluster}"
