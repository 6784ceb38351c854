"""The content of manifest.json: its types and checks.

Every name in a manifest is a plain file name in the manifest's own folder. Manifests are untrusted: names that could
lead elsewhere (a slash, a leading dot) are refused before any file is opened.
"""

from collections import Counter
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from data_pipeline.errors import InputError

FORMAT = "megatron_tn.shards"
VERSION = 2

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53, strict=True)]  # a sum over a manifest is a Count, too, and fits int64
STRICT = ConfigDict(extra="forbid")


@checked_dataclass(frozen=True, config=STRICT)
class TokenizerInfo:
    """The shards' tokenizer: its file beside the manifest, and the special ids, so that readers need not load it."""

    file: FileName
    sha256: Sha256
    vocab_size: Count
    bos: Count
    eos: Count
    pad: Count


@checked_dataclass(frozen=True, config=STRICT)
class SourceInfo:
    """A source: its category, and how often an epoch of training repeats it."""

    category: str = ""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


@checked_dataclass(frozen=True, config=STRICT)
class Shard:
    """One tar file of documents of one source. `tokens` counts bos and eos; `text_bytes` is UTF-8 bytes of text;
    `size` is the tar's, in bytes; `shortest_document` is in tokens and bounds how many documents a sequence can touch.
    """

    name: FileName
    source: str
    documents: Count
    tokens: Count
    text_bytes: Count
    shortest_document: Count
    size: Count
    sha256: Sha256
    index: FileName
    index_sha256: Sha256


@checked_dataclass(frozen=True, config=STRICT)
class Totals:
    """Sums over the shards, for information and consistency checks."""

    shards: Count
    documents: Count
    tokens: Count
    text_bytes: Count


@checked_dataclass(frozen=True, config=STRICT)
class Content:
    """The parsed content of manifest.json."""

    format: Literal["megatron_tn.shards"]
    version: Literal[2]
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "uint32"]
    sources: dict[str, SourceInfo]
    shards: tuple[Shard, ...]
    totals: Totals


CONTENT = TypeAdapter(Content)


def total(shards: tuple[Shard, ...] | list[Shard]) -> Totals:
    """The sums over these shards."""
    return Totals(
        shards=len(shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
    )


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype for stored ids below `vocab_size`."""
    if not 0 < vocab_size <= 2**32:
        raise InputError(f"vocab_size={vocab_size} must be between 1 and 2**32, the widest token that shards can hold")
    return "uint16" if vocab_size <= 2**16 else "uint32"


def contradictions(content: Content) -> list[str]:
    """A line for each inconsistency of a well-formed manifest, such as totals that are not the shards' sums."""
    problems = []
    for field in ("name", "index", "sha256"):
        # A copy of a shard under a second name would feed its documents twice.
        repeated = [value for value, n in Counter(getattr(s, field) for s in content.shards).items() if n > 1]
        problems += [f"duplicated shard: {field}={value} is listed more than once" for value in repeated]
    for shard in content.shards:
        if not 0 < shard.documents * shard.shortest_document <= shard.tokens:
            problems.append(
                f"shard {shard.name}: documents={shard.documents} of at least shortest_document="
                f"{shard.shortest_document} tokens do not fit tokens={shard.tokens}"
            )
    if (used := {shard.source for shard in content.shards}) != set(content.sources):
        problems.append(f"sources={sorted(content.sources)} are not those of the shards, {sorted(used)}")
    if (expected := total(content.shards)) != content.totals:
        problems.append(f"totals={content.totals} are not the sums over the shards, {expected}")
    if content.dtype != (needed := token_dtype(content.tokenizer.vocab_size)):
        problems.append(f"dtype={content.dtype} is not {needed}, which vocab_size={content.tokenizer.vocab_size} needs")
    for name in ("bos", "eos", "pad"):
        if (value := getattr(content.tokenizer, name)) >= content.tokenizer.vocab_size:
            problems.append(f"tokenizer.{name}={value} is not below vocab_size={content.tokenizer.vocab_size}")
    return problems
