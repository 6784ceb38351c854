"""Where text comes from: the settings of each kind of source."""

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from data_pipeline.locations import local, openable
from data_pipeline.shards.index import language_number
from data_pipeline.thresholds import Count, Positive

STRICT = ConfigDict(extra="forbid")


def storable(language: str) -> str:
    """A language code that an index of a shard can hold."""
    language_number(language)
    return language


Location = Annotated[str, AfterValidator(openable)]
LocalFolder = Annotated[str, AfterValidator(local)]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Source:
    """What all kinds have in common. `path`: a folder, local or on any file system of fsspec, such as s3://bucket/crawl.

    `category`: for the mixture and the report; `epochs`: how often an epoch of training goes over the source;
    `priority`: of duplicates, the copy in the source of the highest stays; `language`: the code of all documents, where
    it is known ("" for code and the like), null to identify each; `max_document_bytes`: larger ones are quarantined
    unread; `max_expansion`: a compressed file that gives more than so many times its size, and more than the largest
    document, is a bomb: what came before stays, and the rest is quarantined unread; `max_seconds`: a page that takes
    longer to extract is quarantined. docs/bounds.md lists the bounds that follow from these.
    """

    path: Location
    category: str = ""
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    priority: Annotated[int, Field(ge=0, le=1000)] = 0
    language: Annotated[str, AfterValidator(storable)] | None = None
    max_document_bytes: Positive = 100_000_000
    max_expansion: Positive = 200
    max_seconds: Positive = 60


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Tree(Source):
    """A folder whose files are the documents: plain text, Markdown, source code; of .html, .htm and .xhtml, the text
    that a reader of the page sees; each also as .gz and .zst when `suffixes` say so. `path` may be `stdlib` for the
    running Python's standard library. `fill`: installed packages whose sources are added, one by one, while the source
    has fewer than `minimum_bytes`."""

    kind: Literal["tree"]
    suffixes: tuple[str, ...] = (".py",)
    exclude: tuple[str, ...] = ("site-packages", "dist-packages", "__pycache__", ".git", "node_modules")
    fill: tuple[str, ...] = ()
    minimum_bytes: Count = 0


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Jsonl(Source):
    """JSON lines, plain, .gz or .zst: a document a line, its text under `text_key`. `id_key`: where a line has a name
    of its own, kept as `key` in the metadata. `html`: the text is a page to extract from."""

    kind: Literal["jsonl"]
    glob: str = "**/*.jsonl*"
    text_key: str = "text"
    id_key: str = "id"
    html: bool = False


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Parquet(Source):
    """Parquet files: a document a row. Needs the package pyarrow. `max_row_group_bytes`: of the columns that are read,
    uncompressed; a larger row group is quarantined unread, since Parquet has no smaller bound on what one takes."""

    kind: Literal["parquet"]
    glob: str = "**/*.parquet"
    text_key: str = "text"
    id_key: str = "id"
    html: bool = False
    max_row_group_bytes: Positive = 4_000_000_000


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Warc(Source):
    """WARC files of a crawl: the text of each page that was fetched, and the plain text of WET files. `statuses`: of
    HTTP, whose responses are documents; others are quarantined."""

    kind: Literal["warc"]
    glob: str = "**/*.warc*"
    statuses: tuple[Annotated[int, Field(ge=100, le=999)], ...] = (200,)


def category_of(name: str, source: Source) -> str:
    """The category of a source: its own, or else its name."""
    return source.category or name


AnySource = Annotated[Tree | Jsonl | Parquet | Warc, Field(discriminator="kind")]
