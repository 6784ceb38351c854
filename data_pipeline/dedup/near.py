"""Near duplicates: datatrove's MinHash in its four stages, with words that suit code and text without spaces."""

import re
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.config import NearDuplicates
from data_pipeline.dedup import HASH
from data_pipeline.steps import drop_writer

# A character of a script that puts no spaces between words is a word.
SPACELESS = r"\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[^\W{SPACELESS}]+|\w")


class Words(WordTokenizer):
    """Words by pattern. datatrove's default is spacy's English tokenizer, which takes a minute for what takes this a
    second and knows no more about code."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [line for line in text.splitlines() if line.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in WORD.finditer(text)]


def minhash_config(settings: NearDuplicates) -> MinhashConfig:
    # Stripping diacritics walks over every character in Python and hardly ever changes what is similar.
    norm = TextNormConfig(norm_unicode_diacritics=False)
    return MinhashConfig(settings.words, settings.buckets, settings.hashes, norm_config=norm, hash_config=HASH)


def signatures(settings: NearDuplicates, work: Path) -> PipelineStep:
    """Per task: each document's signature."""
    return MinhashDedupSignature(str(work / "near" / "signatures"), minhash_config(settings), Words())


def buckets(settings: NearDuplicates, work: Path) -> PipelineStep:
    """In one task a bucket: pairs with equal signatures."""
    return MinhashDedupBuckets(
        str(work / "near" / "signatures"), str(work / "near" / "pairs"), config=minhash_config(settings)
    )


def cluster(settings: NearDuplicates, work: Path) -> PipelineStep:
    """In one task: connected pairs, and who stays of each cluster."""
    return MinhashDedupCluster(
        str(work / "near" / "pairs"), str(work / "near" / "remove"), minhash_config(settings), save_cluster_id=True
    )


def remove(settings: NearDuplicates, work: Path, drops: Path) -> PipelineStep:
    """Per task: drops all of a cluster but one, recording the cluster and the similarity that the settings catch."""
    similarity = round((1 / settings.buckets) ** (1 / settings.hashes), 3)

    def reason(document: Document) -> dict:
        value = f"cluster:{document.metadata['minhash_cluster_id']}"
        return {"filter": "near_duplicate", "measure": "similarity", "value": value, "threshold": similarity}

    return MinhashDedupFilter(str(work / "near" / "remove"), drop_writer(drops, reason), load_cluster_ids=True)
