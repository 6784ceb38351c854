"""Near duplicates: datatrove's MinHash in four stages, with words that suit code and text without spaces, and with our
own choice of who stays: the copy of the source of highest priority, where datatrove keeps any."""

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
from data_pipeline.letters import WORDS, composed, find_words
from data_pipeline.steps.drops import drop_writer

PRIME = np.uint64(2**61 - 1)  # of datatrove's permutations: x -> (a x + b mod 2**64) mod PRIME
SHIFT = np.uint64(61)
PIECE = 64  # runs of words whose permutations are taken at once: 57 kB with 112 hashes, which a core's cache holds
MULTIPLIER, MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, their bits evenly set
MOST_WORDS = 1 << 18  # whose hashes are remembered
DOCUMENTS = 1024  # signatures that are written at once
ASCII_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)?")
ASCII_WORD = re.compile(r"[a-z0-9]+")


class Words(WordTokenizer):
    """Words by pattern. datatrove's default is spacy's English tokenizer, which takes a minute for what takes this a
    second and knows no more about code."""

    def word_tokenize(self, text: str) -> list[str]:
        return find_words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in WORDS.finditer(text)]


class Signature(MinhashDedupSignature):
    """datatrove's signatures over hashes that cost a tenth: each word is hashed once, a run of words is a polynomial of
    its words' hashes, and the permutations are taken in pieces, so that memory does not grow with the document."""

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of the runs of words, uint64 [runs, 1]."""
        words = self._words(text)
        runs = len(words) - self.config.n_grams + 1
        if runs < 1:
            return np.empty((0, 1), np.uint64)
        if len(_word_hashes) > MOST_WORDS:
            _word_hashes.clear()
        numbers = np.frombuffer(b"".join(map(_word_hashes.__getitem__, words)), np.dtype("<u8"))
        hashes = np.zeros(runs, np.uint64)
        for place in range(self.config.n_grams):  # modulo 2**64, which is what numpy's uint64 does
            hashes = hashes * MULTIPLIER + numbers[place : place + runs]
        hashes ^= hashes >> np.uint64(32)  # the low bits of a polynomial know little of its first words
        return (hashes * MIXER).reshape(-1, 1)

    def _words(self, text: str) -> list[str]:
        """The words that are compared: in lower case, numbers as 0, without punctuation."""
        if text.isascii():  # what the lines below do, by patterns that cost a third
            return ASCII_WORD.findall(ASCII_NUMBER.sub("0", text.lower()))
        return self.word_tokenizer.word_tokenize(simplify_text(composed(text), self.config.norm_config))

    def get_signature(self, shingles: np.ndarray) -> np.ndarray:
        """The least of each permutation over all runs, uint64 [buckets, hashes]."""
        multipliers, summands = self.parameters
        least = np.full(self.num_hashes, np.iinfo(np.uint64).max, np.uint64)
        values, high = np.empty((2, PIECE, self.num_hashes), np.uint64)
        for at in range(0, len(shingles), PIECE):
            piece = shingles[at : at + PIECE]
            x, q = values[: len(piece)], high[: len(piece)]
            np.multiply(piece, multipliers, out=x)
            x += summands
            # With x = q 2**61 + r, x mod PRIME is q + r, or that less PRIME; what is below zero wraps to the top.
            np.right_shift(x, SHIFT, out=q)
            x &= PRIME
            x += q
            np.subtract(x, PRIME, out=q)
            np.minimum(x, q, out=x)
            np.minimum(least, x.min(axis=0), out=least)
        return least.reshape(self.config.num_buckets, self.config.hashes_per_bucket)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Writes bucket_NNN/RANK.minhash.sig as datatrove does: records of a bucket's hashes and the place of the
        document in the task, sorted, here by columns of numbers, there by comparing field by field."""
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
            keys = (rows["document"], *rows["hashes"].T[::-1])  # the last is the first to sort by
            with folder.open(name, "wb") as file:
                file.write(rows[np.lexsort(keys)].tobytes())


class _WordHashes(dict):
    """{word: eight bytes of its hash}."""

    def __missing__(self, word: str) -> bytes:
        self[word] = found = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return found


_word_hashes = _WordHashes()


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
